"""Seconds that commands take from their start to their end, each in a process of its own.

    python scripts/time_commands.py [RUNS_FOLDER]

Prints processor seconds (user and system) and seconds by the clock: the least of five starts. On a busy machine only
the first says how much there is to do.
"""

import os
import subprocess
import sys
import time

REPEATS = 5
QUICK = (["--help"], ["--version"], ["configs"], ["sweep", "--help"])


def seconds(arguments: list[str]) -> tuple[float, float]:
    """Processor and clock seconds of a command, the least of some starts each."""
    taken = []
    for _ in range(REPEATS):
        before, started = os.times(), time.perf_counter()
        subprocess.run([sys.executable, "-m", "trainers", *arguments], capture_output=True, check=False)
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        taken.append((used, time.perf_counter() - started))
    return min(one[0] for one in taken), min(one[1] for one in taken)


def main() -> None:
    """Prints a line for each command."""
    listing = [["runs", sys.argv[1]]] if len(sys.argv) > 1 else []
    print("| command | processor seconds | seconds |\n|---|---|---|")
    for arguments in [*QUICK, *listing, ["completion", "bash"], ["train", "--help"]]:
        used, clock = seconds(arguments)
        print(f"| `ddpo {' '.join(arguments)}` | {used:.2f} | {clock:.2f} |", flush=True)


if __name__ == "__main__":
    main()
