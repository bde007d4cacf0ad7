"""Guards refactorings: runs tiny configurations at two commits and compares all they leave behind, bit for bit.

    python scripts/compare_commits.py A            A against HEAD
    python scripts/compare_commits.py A B          two commits
    python scripts/compare_commits.py A .          A against the working tree, what is not committed included
    python scripts/compare_commits.py A . --only ppo,resume --jobs 2
    python scripts/compare_commits.py A B --expect '*/metrics/kl/path_nats'

Compared are the rows of metrics (but the clock's), evaluations, exported weights, and the tensors and values of every
checkpoint. Both sides run on this machine, on its CPU, in one thread, from the same pipelines and global random states,
so that a difference is the code's. The exit status is 0 when all entries are identical, 1 when some are not.

`--expect PATTERN` names entries (`*` and `?` as in a shell, `*` also over `/`) that the newer commit changes on
purpose: they are listed and do not fail. What only gets another name belongs into `RENAMED` of
`scripts/comparison/entries.py`.
The configurations are in `scripts/comparison/runs.yaml`, which says how to add one for a new algorithm.
"""

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from comparison.compare import compare
from comparison.plan import chosen, read_plan
from comparison.report import describe, passed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs both sides and prints the table; status 1 when entries differ or a run fails, 2 for a wrong argument."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # leaves through every `finally`
    folder = Path(tempfile.mkdtemp(prefix="compare_commits_"))
    try:
        plan = chosen(read_plan(folder / "shared"), options.only)
        if options.list:
            print("\n".join(planned.name for planned in plan))
            return 0
        reports = compare(plan, (options.a, options.b), folder, jobs=options.jobs, expect=options.expect)
        print(describe(reports, options.expect))
        return 0 if passed(reports) else 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if options.keep:
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", nargs="?", metavar="A", help="the older commit, or . for the working tree")
    parser.add_argument("b", nargs="?", metavar="B", default="HEAD", help="the newer commit (default HEAD), or .")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="NAME,...", help="only these")
    parser.add_argument("--list", action="store_true", help="print the names of the configurations")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time (default 1)")
    parser.add_argument("--expect", action="append", default=[], metavar="PATTERN", help="entries that may differ")
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder, with all runs and their output")
    options = parser.parse_args(arguments)
    if options.a is None and not options.list:
        parser.error("A, the commit to compare with, is missing")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    return options


if __name__ == "__main__":
    sys.exit(main())
