"""One process at a time writes a run folder.

The main process of a run holds a lock of the operating system on `<run>/.lock` while it trains, which lets go of it
however the process ends. Where the file system has no locks a run goes on without.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TextIO

from filelock import lock_descriptor

from trainers.parallel.processes import Processes
from trainers.run_folder.folder import RunError, RunFolder

LOCK = ".lock"


@contextmanager
def held(run: RunFolder, processes: Processes) -> Iterator[None]:
    """Keeps others from training the same run for the time of a `with` block.

    Args:
        run: The run folder.
        processes: Who shares the run; the main process holds the lock for all.

    Raises:
        RunError: Another process holds it; raised on all.
    """
    with ExitStack() as stack:
        owner = processes.gather_json(lock(run, stack) if processes.is_main else None)[0]
        if owner is not None:
            raise RunError(
                f"{run.path} is being trained by another process ({owner}): wait for its end, or stop it first"
            )
        yield


def lock(run: RunFolder, stack: ExitStack) -> str | None:
    """Takes the lock until the stack is closed; returns who holds it instead, or None."""
    file = stack.enter_context((run.path / LOCK).open("a+", encoding="utf-8", errors="replace"))
    try:
        if not lock_descriptor(file.fileno(), blocking=False):
            return _owner(file)
    except OSError:  # this file system has no locks
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return None


def _owner(file: TextIO) -> str:
    file.seek(0)
    try:
        return file.read().strip() or "unknown"
    except OSError:  # Windows does not let others read what is locked
        return "unknown"
