"""Every file of a run folder, damaged in every way, before the run goes on."""

from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.choice import Choice
from tests.faults.runs import child, contents, copied, difference, go_on, is_refused, result
from tests.faults.table import Case


def _cut(file: Path, other: Path) -> None:
    file.write_bytes(file.read_bytes()[: max(0, file.stat().st_size * 2 // 3)])


def _flip(file: Path, other: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def _empty(file: Path, other: Path) -> None:
    file.write_bytes(b"")


def _delete(file: Path, other: Path) -> None:
    file.unlink()


def _replace(file: Path, other: Path) -> None:
    file.write_bytes(other.read_bytes())


FAULTS: dict[str, Callable[[Path, Path], None]] = {
    "cut short": _cut,
    "a bit flipped": _flip,
    "emptied": _empty,
    "deleted": _delete,
    "another run's": _replace,
}
QUICK = (
    "config.yaml", "files.json", "metrics.jsonl", "rewards.json", "evaluations/epoch_000000.safetensors",
    "evaluations/epoch_000001.safetensors", "checkpoints/epoch_000002/values.json",
    "checkpoints/epoch_000002/manifest.json",
)  # fmt: skip


def corruptions(folder: Path, choice: Choice) -> Iterator[Case]:
    """Tries each fault on each file.

    Args:
        folder: As `runs.prepare` has left it.
        choice: Where it is quick, one fault, another one for each file, on the files of `QUICK`.
    """
    run, other = folder / "run", folder / "other"
    with copied(run) as undisturbed:
        assert child(lambda: go_on(undisturbed)).status == 0
        wanted = result(undisturbed)
    names = QUICK if choice.quick else sorted(name for name, content in contents(run).items() if content)
    for place, name in enumerate(names):
        faults = list(FAULTS.items())
        for fault, apply in faults[place % len(faults) :][:1] if choice.quick else faults:
            counterpart = other / name
            if not counterpart.is_file() or not choice.takes(f"file {fault}", name):
                continue
            yield Case(fault=f"file {fault}", what=name, problem=_try(run, name, counterpart, apply, wanted))


def _try(run: Path, name: str, other: Path, apply: Callable, wanted: dict[str, object]) -> str:
    """What is wrong with how a damaged file is met; empty for nothing."""
    with copied(run) as broken:
        before = (broken / name).read_bytes()
        apply(broken / name, other)
        if (broken / name).is_file() and (broken / name).read_bytes() == before:
            return ""  # the other run's is the same
        damaged = contents(broken)
        ended = child(lambda: go_on(broken))
        if ended.status == 0:
            return difference(result(broken), wanted)
        if not is_refused(ended):
            return f"status {ended.status}: {ended.said.strip().splitlines()[-1:]}"
        return "" if contents(broken) == damaged else "refused, but files were changed"
