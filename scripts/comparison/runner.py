"""Runs configurations one after the other at whichever checkout PYTHONPATH names; `processes` starts it.

    PYTHONPATH=CHECKOUT python runner.py JOBS.json

JOBS.json is a list of `{"commands", "log", "result"}`: the arguments of some `ddpo` commands, the file for their
output, and the file for `{"status", "message"}`, the first exit status that is not 0 and the last line of output. One
process runs many configurations, so that imports are paid for once; each starts from the same global random states.
Nothing of the project is called but `trainers.cli.main`.
"""

import contextlib
import json
import os
import random
import sys
import traceback
from pathlib import Path

import numpy as np
import torch

STOPPED = (75, 130)
"""Exit statuses of a command that a signal has stopped."""


def main() -> int:
    """Runs all jobs; a job that fails does not keep the others from running, a signal does."""
    import trainers
    from trainers.cli import main as ddpo

    assert Path(trainers.__file__).is_relative_to(os.environ["PYTHONPATH"]), (
        f"{trainers.__file__} is another checkout's"
    )
    is_main = os.environ.get("RANK", "0") == "0"
    for job in json.loads(Path(sys.argv[1]).read_text()):
        log = Path(job["log"]) if is_main else Path(os.devnull)
        status, message = 0, ""
        with log.open("w", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            for arguments in job["commands"]:
                seed()
                try:
                    status = ddpo(arguments)
                except SystemExit as exit:
                    status = exit.code if isinstance(exit.code, int) else 2
                except Exception as error:
                    traceback.print_exc(file=file)
                    status, message = 1, f"{type(error).__name__}: {error}"
                if status:
                    break
        if status in STOPPED:
            return status
        if is_main:
            message = message or (last_line(log) if status else "")
            Path(job["result"]).write_text(json.dumps({"status": status, "message": message}))
    return 0


def seed() -> None:
    """Sets the global generators, whose states are in checkpoints, and keeps torch to one thread."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  the global generator is what is wanted
    torch.manual_seed(0)
    torch.set_num_threads(1)


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


if __name__ == "__main__":
    sys.exit(main())
