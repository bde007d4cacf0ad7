"""One process at a time writes a run folder.

The main process of a run holds a lock (`flock`) on `<run>/.lock` while it trains; the operating system lets go of it
however the process ends. Where the file system has no locks, a run goes on without.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from trainers.processes import Processes
from trainers.run import RunError, RunFolder

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
        owner = processes.gather_json(_lock(run, stack) if processes.is_main else None)[0]
        if owner is not None:
            raise RunError(
                f"{run.path} is being trained by another process ({owner}): wait for its end, or stop it first"
            )
        yield


def _lock(run: RunFolder, stack: ExitStack) -> str | None:
    """Takes the lock until the stack is closed; returns who holds it instead, or None."""
    file = stack.enter_context((run.path / LOCK).open("a+"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read().strip() or "unknown"
    except OSError:  # this file system has no locks
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return None
