"""Faults on purpose: `python -m tests.faults` breaks runs, kills them, and sets evil peers on servers and clients.

A fault is borne well when the result is the same bit for bit, or when it is refused: a message of a line or a few,
no traceback, a status that is not 0, and every file as it was. After a kill, the run (or the same command, where it had
not begun) must reach the same result bit for bit. A peer is borne well when honest work goes on, or ends in one line
within its time limit.

    python -m tests.faults [--quick] [--only corruption,kills,peers] [--fraction 0.3 --seed 0] [--keep FILE]

prints the table, with status 1 when a fault is not borne well. `--fraction`
tries a part of them, drawn by `--seed`; `--keep` writes each into a file as it is tried, and a second call with the
same file goes on where the first was stopped. Calls side by side need files of their own.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes are forked

from tests.faults.choice import Choice, keep, read_done
from tests.faults.corruption import corruptions
from tests.faults.kills import kills
from tests.faults.peers import peers
from tests.faults.runs import prepare
from tests.faults.table import table

GROUPS = {"corruption": corruptions, "kills": kills, "peers": peers}


def main() -> int:
    """Tries all faults and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few of each kind, under a minute")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, separated by commas (default all)")
    parser.add_argument("--fraction", type=float, default=1.0, help="part of the faults to try (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of that part (default 0)")
    parser.add_argument("--keep", type=Path, help="file of what was tried, made or continued")
    options = parser.parse_args()
    cases = read_done(options.keep) if options.keep else []
    done = frozenset((case.fault, case.what) for case in cases)
    choice = Choice(quick=options.quick, fraction=options.fraction, seed=options.seed, done=done)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        for name in options.only.split(","):
            for case in GROUPS[name](folder, choice):
                cases.append(case)
                if options.keep:
                    keep(cases, options.keep)
                if sys.stderr.isatty() or case.problem:
                    print(f"{case.fault}: {case.what}: {case.problem or 'good'}", file=sys.stderr, flush=True)
    print(table(cases))
    return int(any(case.problem for case in cases))


if __name__ == "__main__":
    sys.exit(main())
