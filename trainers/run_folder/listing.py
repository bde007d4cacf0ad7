"""The runs of a folder at a glance, read from their text files alone: nothing heavy is imported, nothing is written.

A damaged run is listed with what can be read of it.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["running", "finished", "stopped", "damaged"]
_MEAN_OF = 10  # a reward of that many epochs, or of the last tenth, is shown


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One run.

    Attributes:
        name: Its folder, relative to the folder that is listed.
        state: `running` while a process holds it, `finished` once its weights are exported, `stopped` if it can go on.
        epochs: Finished ones.
        of: Epochs that it was to have; None if the configuration is damaged.
        reward: Means of the total reward in the first and in the last epochs; None without rewards.
        kl: Path KL of the last epoch, nats; None where it is not measured.
        minutes: Of training.
        bytes: Of all its files.
        changed: When its metrics were last written, seconds since 1970.
    """

    name: str
    state: State
    epochs: int
    of: int | None
    reward: tuple[float, float] | None
    kl: float | None
    minutes: float
    bytes: int
    changed: float


def list_runs(folder: Path) -> list[RunSummary]:
    """The runs in a folder, or the folder itself if it is one, the latest changed last."""
    is_run = (folder / "config.yaml").is_file()
    paths = [folder] if is_run else [config.parent for config in folder.glob("[!.]*/config.yaml")]
    return sorted((_summary(path) for path in paths), key=lambda run: (run.changed, run.name))


def _summary(run: Path) -> RunSummary:
    config, rows = _config(run), _rows(run)
    last = rows[-1] if rows else {}
    rewards = [row["reward/mean"] for row in rows if isinstance(row.get("reward/mean"), int | float)]
    tail = max(1, min(_MEAN_OF, len(rewards) // 10))
    kl = last.get("kl/path_nats", last.get("kl/conditional_path_nats"))
    epochs = last.get("epoch", 0)
    metrics = run / "metrics.jsonl"
    return RunSummary(
        name=run.resolve().name,
        state=_state(run, config),
        epochs=epochs,
        of=None if config is None else config.get("epochs"),
        reward=(sum(rewards[:tail]) / tail, sum(rewards[-tail:]) / tail) if rewards else None,
        kl=kl if isinstance(kl, int | float) else None,
        minutes=float(last.get("time/total_seconds") or 0.0) / 60,
        bytes=_size(run),
        changed=(metrics if metrics.is_file() else run).stat().st_mtime,
    )


def _state(run: Path, config: dict | None) -> State:
    if is_held(run / ".lock"):
        return "running"
    if config is None or not (run / "metrics.jsonl").is_file():
        return "damaged"
    exported, metrics = run / "lora", run / "metrics.jsonl"
    is_newest = exported.is_dir() and exported.stat().st_mtime + 60 > metrics.stat().st_mtime
    return "finished" if is_newest else "stopped"


def is_held(lock: Path) -> bool:
    """Whether a process of this machine holds a run's lock; asked without taking it, so that no start is refused."""
    try:
        inode = lock.stat().st_ino
        held = Path("/proc/locks").read_text(encoding="utf-8")
    except OSError:
        return False  # no lock yet, or a system that does not list them
    places = [fields[5] for fields in map(str.split, held.splitlines()) if fields[1] == "FLOCK"]
    return any(place.rpartition(":")[2] == str(inode) for place in places)


def _config(run: Path) -> dict | None:
    import yaml

    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        read = yaml.load(
            (run / "config.yaml").read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        )
        return read if isinstance(read, dict) else None
    return None


def _rows(run: Path) -> list[dict]:
    rows: list[dict] = []
    with suppress(OSError):
        for line in (run / "metrics.jsonl").read_bytes().splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("epoch"), int):
                    rows.append(row)
    return rows


def _size(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(parent) / name).stat().st_size
    return total


HEADER = ("run", "state", "epochs", "reward", "KL (nats)", "minutes", "size")


def as_table(runs: Sequence[RunSummary]) -> str:
    """A line for each run under a ruled header."""
    rows = [HEADER, *map(cells, runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(cells) for cells in aligned)


def cells(run: RunSummary) -> tuple[str, ...]:
    """A run's line under `HEADER`."""
    return (
        run.name,
        run.state,
        f"{run.epochs}/{'?' if run.of is None else run.of}",
        "-" if run.reward is None else f"{run.reward[0]:.4g} -> {run.reward[1]:.4g}",
        "-" if run.kl is None else f"{float(f'{run.kl:.3g}'):.6g}",
        f"{run.minutes:.1f}",
        _readable(run.bytes),
    )


def _readable(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
