"""Trains runs in processes of their own, some at a time: a run's memory and random state end with it.

What a run prints goes to a log beside its folder. A signal to the sweep is passed on to every run at work, which saves
its last whole epoch; none is begun any more. A run that fails does not keep the others from training.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainers.parallel.interruption import HANDLED, RunStopped
from trainers.sweep.bar import Bar

_LOOK_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Task:
    """A run to train.

    Attributes:
        run: Its folder.
        arguments: Of `ddpo train`.
    """

    run: Path
    arguments: tuple[str, ...]

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.run.with_name(f"{self.run.name}.log")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that did not reach its end.

    Attributes:
        run: Its folder.
        status: Exit status of its process; the negative number of the signal that ended it.
        log: What it printed.
    """

    run: Path
    status: int
    log: Path

    def __str__(self) -> str:
        number = -self.status
        how = f"killed by {signal.Signals(number).name}" if number > 0 else f"status {self.status}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.is_file() else []
        said = next((line.rpartition("\r")[2].strip() for line in reversed(lines) if line.strip()), "")
        return f"{self.run.name} failed ({how}): {said} [{self.log}]"


@dataclass(kw_only=True)
class _AtWork:
    """A process; how many signals it has been told."""

    task: Task
    process: subprocess.Popen
    told: int = 0


def train_all(tasks: Sequence[Task], *, jobs: int, bar: Bar) -> list[Failure]:
    """Trains runs, up to `jobs` at a time.

    Args:
        tasks: The runs, in the order in which they begin.
        jobs: Processes at a time, at least 1.
        bar: Told what has ended.

    Returns:
        The runs that failed.

    Raises:
        RunStopped: On a signal, once the runs at work have saved their last whole epochs.
    """
    waiting, at_work, failures = deque(tasks), dict[int, _AtWork](), list[Failure]()
    with _signals() as received:
        while at_work or (waiting and not received):
            for slot in range(jobs):
                if slot not in at_work and waiting and not received:
                    at_work[slot] = _begin(waiting.popleft(), slot, jobs)
            for slot, one in list(at_work.items()):
                _pass_on(received, one)
                status = one.process.poll()
                if status is not None:
                    del at_work[slot]
                    failure = Failure(run=one.task.run, status=status, log=one.task.log)
                    failures += [failure] if status else []
                    bar.ended(one.task.run, str(failure) if status else "")
            bar.look([one.task.run for one in at_work.values()])
            time.sleep(_LOOK_SECONDS if at_work else 0)
    if received:
        raise RunStopped(
            f"{signal.Signals(received[0]).name}: {len(waiting) + len(failures)} of {len(tasks)} runs have not ended; "
            "the same command goes on where they stopped"
        )
    return failures


def _begin(task: Task, slot: int, jobs: int) -> _AtWork:
    task.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "trainers", "train", *task.arguments]
    with task.log.open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment(slot, jobs),
            start_new_session=True,
        )  # fmt: skip
    return _AtWork(task=task, process=process)


def _pass_on(received: Sequence[int], one: _AtWork) -> None:
    """Tells a run the signals that it has not been told; a second one ends it at once."""
    for number in received[one.told :]:
        if one.process.poll() is None:
            one.process.send_signal(number)
    one.told = len(received)


def environment(slot: int, jobs: int) -> dict[str, str]:
    """What a run's process is told: its share of the CPU cores, and one GPU of several in turn.

    Args:
        slot: Which of the processes at a time it is, from 0.
        jobs: How many there are.
    """
    told = dict(os.environ)
    if jobs == 1:
        return told
    told.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    told.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    devices = [name for name in told.get("CUDA_VISIBLE_DEVICES", ",".join(_gpus())).split(",") if name.strip()]
    if len(devices) > 1:
        told["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return told


def _gpus() -> list[str]:
    """Numbers of this machine's NVIDIA GPUs, asked without taking any."""
    places = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number in range(len(list(places.iterdir())))] if places.is_dir() else []


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Remembers signals for the time of a `with` block; yields the numbers of those received so far.

    The runs have sessions of their own: a terminal's Ctrl-C does not reach them, and is passed on once.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    handled = [number for number in HANDLED if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT]
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in handled}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
