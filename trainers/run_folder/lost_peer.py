"""A process of a run that is gone: the others end with one line and the status of a run that can go on.

Whatever a process waits for from another, the wait ends with an error of torch.distributed when the connection closes
(a process that died, at once) or after its time limit (one that hangs).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from trainers.parallel.interruption import PeerLost, RunStopped
from trainers.parallel.launcher import num_processes, rank
from trainers.run_folder.checkpoint import latest_checkpoint

_GLOO = re.compile(r"gloo|connection (closed|reset|refused)|broken pipe|timed out waiting", re.IGNORECASE)


@contextmanager
def peers_needed(run: Path) -> Iterator[None]:
    """Makes of the error of a lost connection one line with the run's last checkpoint.

    Args:
        run: The run folder.

    Raises:
        PeerLost: Another process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if num_processes() == 1 or isinstance(error, RunStopped) or not _is_lost_connection(error):
            raise
        raise PeerLost(_farewell(run)) from error


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed: gloo raises plain RuntimeErrors, NCCL and the store their own."""
    return isinstance(error, dist.DistError) or bool(_GLOO.search(str(error)))


def _farewell(run: Path) -> str:
    saved = latest_checkpoint(run)
    left = "there is no checkpoint yet" if saved is None else f"the last checkpoint is {saved}"
    return (
        f"process {rank()} of {num_processes()} has lost another one, which ended or does not answer (if it said why, "
        f"that is above); {left}; continue with: ddpo train --resume {run}"
    )
