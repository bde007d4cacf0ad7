"""Runs that are killed at a file operation, by an audit hook, and then go on."""

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.choice import Choice
from tests.faults.runs import EPOCHS, KILLED, child, copied, difference, go_on, result, start
from tests.faults.table import Case

OPERATIONS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}


def hooked(
    work: Callable[[], int], below: Path, *, kill_at: int | None, report: int | None = None
) -> Callable[[], int]:
    """Work that is killed at one of the file operations below a folder, or that reports how many there were."""

    def with_hook() -> int:
        count = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count
            writes = event == "open" and isinstance(arguments[1], str) and any(x in arguments[1] for x in "wax+")
            if not (writes or event in OPERATIONS) or not str(arguments[0]).startswith(str(below)):
                return
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        sys.addaudithook(hook)
        status = work()
        if report is not None:
            os.write(report, str(count).encode())
        return status

    return with_hook


def kills(folder: Path, choice: Choice) -> Iterator[Case]:
    """Kills a new run and a resumed one at their file operations, and lets them go on.

    Args:
        folder: As `runs.prepare` has left it.
        choice: Where it is quick, two moments of each in place of all.
    """
    with tempfile.TemporaryDirectory(dir=folder) as undisturbed:
        assert child(lambda: start(folder, "run", output=Path(undisturbed), epochs=EPOCHS)).status == 0
        wanted = result(Path(undisturbed) / "run")
    yield from _starts(folder, wanted, choice)
    yield from _resumes(folder, wanted, choice)


def _starts(folder: Path, wanted: dict[str, object], choice: Choice) -> Iterator[Case]:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        moments = _count(lambda: start(folder, "run", output=Path(place), epochs=EPOCHS), Path(place))
    fault = "kill -9 at a file operation of a new run"
    for moment in _chosen(moments, quick=choice.quick):
        what = f"operation {moment} of {moments}"
        if not choice.takes(fault, what):
            continue
        with tempfile.TemporaryDirectory(dir=folder) as place:
            output = Path(place)
            begin = lambda output=output: start(folder, "run", output=output, epochs=EPOCHS)  # noqa: E731
            killed = child(hooked(begin, output, kill_at=moment))
            again = child((lambda run=output / "run": go_on(run)) if (output / "run").exists() else begin)
            problem = _judge(killed.status, again.status, again.said, output / "run", wanted)
            yield Case(fault=fault, what=what, problem=problem)


def _resumes(folder: Path, wanted: dict[str, object], choice: Choice) -> Iterator[Case]:
    with copied(folder / "run") as run:
        moments = _count(lambda: go_on(run), run)
    fault = "kill -9 at a file operation of a resume"
    for moment in _chosen(moments, quick=choice.quick):
        what = f"operation {moment} of {moments}"
        if not choice.takes(fault, what):
            continue
        with copied(folder / "run") as run:
            killed = child(hooked(lambda run=run: go_on(run), run, kill_at=moment))
            again = child(lambda run=run: go_on(run))
            problem = _judge(killed.status, again.status, again.said, run, wanted)
            yield Case(fault=fault, what=what, problem=problem)


def _judge(killed: int, again: int, said: str, run: Path, wanted: dict[str, object]) -> str:
    if killed != KILLED:
        return f"it was not killed: status {killed}"
    if again != 0:
        return f"going on ended with status {again}: {said.strip().splitlines()[-1:]}"
    return difference(result(run), wanted)


def _count(work: Callable[[], int], below: Path) -> int:
    """File operations of some work."""
    read, write = os.pipe()
    ended = child(hooked(work, below, kill_at=None, report=write))
    assert ended.status == 0, ended.said
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        return int(pipe.read())


def _chosen(moments: int, *, quick: bool) -> list[int]:
    return [moments // 4, moments // 2] if quick else list(range(moments))
