"""Runs functions in fresh processes that share a gloo group, each forked at once from a server that has torch."""

import faulthandler
import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

PRELOADED = ["trainers.loop", "trainers.config.io", "trainers.planning.preflight", "diffusers", "peft", "tests.tiny"]
TIMEOUT_SECONDS = 400
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"
}  # fmt: skip
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOADED)


def in_processes(
    function: Callable[..., object], *arguments: object, count: int = 1, log: Path | None = None
) -> list[int]:
    """Exit statuses of `count` processes that run function(*arguments); nonzero too where it raises.

    Args:
        function: Of a module that can be imported.
        arguments: What it is given.
        count: Processes; more than one find each other as torchrun's would.
        log: File for what they print, `<log>.<rank>`; None prints it here.
    """
    port = free_port()
    children = [
        _CONTEXT.Process(target=_enter, args=(function, arguments, rank, count, port, log)) for rank in range(count)
    ]
    with patch.dict(os.environ, ENVIRONMENT):  # for the server, which keeps what it was started with
        for child in children:
            child.start()
    for child in children:
        child.join(TIMEOUT_SECONDS)
        if child.is_alive():
            child.kill()
            child.join()
    return [child.exitcode for child in children]


def all_succeed(function: Callable[..., object], *arguments: object, count: int, log: Path) -> None:
    """Runs as `in_processes` does; a failure shows each process's exit status and the end of what it printed."""
    statuses = in_processes(function, *arguments, count=count, log=log)
    if any(statuses):
        ends = (f"rank {rank}: exit status {status}\n{_end(f'{log}.{rank}')}" for rank, status in enumerate(statuses))
        raise AssertionError("\n".join(ends))


def _end(file: str) -> str:
    """The last lines of a file, without what progress bars overwrote."""
    return "\n".join(line.rpartition("\r")[2] for line in Path(file).read_text().splitlines()[-60:])


def command(arguments: Sequence[str]) -> None:
    """The command line `ddpo`, as the body of a process."""
    from trainers.cli import entry_point

    entry_point(arguments)


def _enter(
    function: Callable[..., object], arguments: tuple, rank: int, count: int, port: int, log: Path | None
) -> None:
    import torch

    torch.set_num_threads(1)
    if log is not None:
        file = os.open(f"{log}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
    faulthandler.enable()
    faulthandler.dump_traceback_later(TIMEOUT_SECONDS - 20)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if count > 1:
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
            WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
        )  # fmt: skip
    function(*arguments)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
