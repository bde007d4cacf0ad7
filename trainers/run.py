"""A run folder: everything one training run leaves behind, readable without this package.

<output_dir>/<name>/
  config.yaml        the resolved configuration
  environment.json   versions, machine, git commit, command line, start time; one more entry per resume
  rewards.json       see `trainers.reward_record`
  prompts.json       see `trainers.prompt_record`
  objects.json       of a run started from Python, see `trainers.from_python`
  metrics.jsonl      one JSON object per epoch, appended as the run goes
  pictures/          sample grids
  checkpoints/       see `trainers.checkpoint`
  lora/              the final weights, for `pipe.load_lora_weights`
"""

import errno
import itertools
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path

from PIL import Image

from trainers.environment import describe_environment

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
_VALID_NAME = re.compile(r"\w[\w.+=-]*")

Metric = float | int | str | bool | None | Sequence[float]


class RunError(ValueError):
    """A run folder cannot be made, found or read; the message names the cure."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """An existing run folder.

    Attributes:
        path: The folder; its name is the name of the run.
    """

    path: Path

    @classmethod
    def create(cls, output_dir: str | Path, name: str | None, config_yaml: str, *, stem: str = "run") -> "RunFolder":
        """Makes a new run folder with its configuration and environment, on the main process, before weights load.

        It is written under a hidden name and renamed: a kill leaves no folder that could be neither resumed nor made.

        Args:
            output_dir: Parent of all runs; made when missing.
            name: Folder name, of none yet or an empty one, or None for `<UTC time>_<stem>`, with a counter if taken.
            config_yaml: The resolved configuration as text.
            stem: What the run is called after: the configuration file without its suffix, or the first reward.

        Raises:
            RunError: The name is taken or not a plain folder name, or the folder cannot be written.
        """
        output_dir = Path(output_dir)
        if name is not None and not _VALID_NAME.fullmatch(name):
            raise RunError(
                f"run.name must be letters, digits and any of _ . + = -, starting with a letter or digit, got {name!r}"
            )
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            partial = cls(path=output_dir / f".partial_{uuid.uuid4().hex}")
            try:
                partial._fill(config_yaml)
                made = _named(partial.path, output_dir / name) if name else _numbered(partial.path, _default_name(stem))
            except BaseException:
                shutil.rmtree(partial.path, ignore_errors=True)
                raise
        except OSError as error:
            reason = error.strerror or str(error)
            raise RunError(
                f"cannot write a run folder in {output_dir}: {reason}; choose a writable one with --run.output_dir"
            ) from error
        return cls(path=made)

    def _fill(self, config_yaml: str) -> None:
        """Makes the folder and what a new run has; the configuration, by which a run folder is known, last."""
        self.path.mkdir()
        write_json(self.path / ENVIRONMENT, describe_environment())
        self.metrics_path.touch()
        for folder in (self.pictures, self.checkpoints):
            folder.mkdir()
        self.save_config(config_yaml)

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """The existing run at `path`; `RunError`, naming the runs beside it, when there is none."""
        path = Path(path)
        if not (path / CONFIG).is_file():
            parent = path if path.is_dir() else path.parent
            runs = sorted(config.parent.name for config in parent.glob(f"[!.]*/{CONFIG}"))
            known = f"; the runs in {parent} are {', '.join(runs)}" if runs else ""
            raise RunError(f"{path} is not a run folder (no {CONFIG} in it){known}")
        return cls(path=path)

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.resolve().name

    @property
    def metrics_path(self) -> Path:
        """The metrics, one JSON object a line."""
        return self.path / METRICS

    @property
    def pictures(self) -> Path:
        """Folder of sample grids."""
        return self.path / "pictures"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def evaluations(self) -> Path:
        """Folder of evaluations; made by whoever writes them."""
        return self.path / "evaluations"

    @property
    def lora(self) -> Path:
        """Folder of the final weights; made by whoever writes them."""
        return self.path / "lora"

    def config_yaml(self) -> str:
        """The configuration the run was started with, or resumed with since."""
        return (self.path / CONFIG).read_text()

    def save_config(self, config_yaml: str) -> None:
        """Replaces the configuration at once."""
        _write_text(self.path / CONFIG, config_yaml)

    def discard_unused(self) -> None:
        """Removes the folder, so that its name is free again, unless it has a finished epoch or a checkpoint."""
        if self.metrics_path.stat().st_size or any(self.checkpoints.iterdir()):
            return
        hidden = self.path.with_name(f".removed_{uuid.uuid4().hex}")
        self.path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def note_resume(self, checkpoint: str) -> None:
        """Adds the present environment, and the checkpoint taken up, to environment.json."""
        environment = json.loads((self.path / ENVIRONMENT).read_text())
        resumed = [*environment.get("resumed", []), {"checkpoint": checkpoint, **describe_environment()}]
        write_json(self.path / ENVIRONMENT, {**environment, "resumed": resumed})

    def save_picture(self, image: Image.Image, name: str) -> Path:
        """Writes `pictures/<name>.png`, visible only when complete, and returns its path."""
        path = self.pictures / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        image.save(partial, format="png")
        partial.replace(path)
        return path

    def append_metrics(self, row: Mapping[str, Metric]) -> None:
        """Appends one epoch's metrics as a line and hands it to the operating system before returning.

        Args:
            row: Must have an integer "epoch". Floats are written bit-exactly; NaN and infinities, which JSON lacks,
                as null; sequences as lists.
        """
        assert isinstance(row["epoch"], Integral), "a row of metrics needs its epoch"
        line = json.dumps({key: _jsonable(key, value) for key, value in row.items()}, allow_nan=False) + "\n"
        _drop_partial_line(self.metrics_path)
        with self.metrics_path.open("a") as file:
            file.write(line)

    def truncate_metrics(self, after_epoch: int) -> None:
        """Keeps only rows whose "epoch" is at most `after_epoch`: what the checkpoint taken up has seen."""
        kept = [row for row in read_metrics(self.path) if row["epoch"] <= after_epoch]
        partial = self.path / f".{METRICS}.partial"
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(self.metrics_path)


def read_metrics(run: str | Path) -> list[dict]:
    """Rows of a run's metrics.jsonl, oldest first, without a last line that is only half written.

    Raises:
        RunError: There is no such file, or a line other than the last is damaged.
    """
    path = Path(run) / METRICS
    if not path.is_file():
        raise RunError(f"{run} has no {METRICS}: is it a run folder?")
    rows = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise RunError(f"{path}, line {number} is not JSON ({error}): remove the line") from error
    return rows


def _drop_partial_line(path: Path) -> None:
    """Cuts what follows the last newline, if anything does."""
    with path.open("a+b") as file:
        if file.tell() == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.truncate(path.read_bytes().rfind(b"\n") + 1)


def _jsonable(key: str, value: object) -> object:
    """Plain Python numbers; null for what is not finite."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Sequence):
        return [_jsonable(key, item) for item in value]
    raise TypeError(f"metric {key!r} is a {type(value).__name__}: log numbers, strings or lists of them")


def _default_name(stem: str) -> str:
    return f"{datetime.now(UTC):%Y-%m-%d_%H-%M-%S}_{re.sub(r'[^A-Za-z0-9_.+=-]+', '-', stem)}"


def _named(partial: Path, path: Path) -> Path:
    if not _renamed(partial, path):
        raise RunError(
            f"{path} exists already: choose another --run.name, or continue that run with `ddpo train --resume {path}`"
        )
    return path


def _numbered(partial: Path, name: str) -> Path:
    """Under the first free of name, name-2, name-3, ...; taken atomically, since several runs may start in a second."""
    names = itertools.chain([name], (f"{name}-{counter}" for counter in itertools.count(2)))
    return next(path for path in map(partial.with_name, names) if _renamed(partial, path))


def _renamed(folder: Path, path: Path) -> bool:
    """Renames a folder, unless there is a file or a folder that is not empty; returns whether it did."""
    try:
        folder.rename(path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    return True


def write_json(path: Path, value: object) -> None:
    """Writes a value as JSON that replaces the file at once."""
    _write_text(path, json.dumps(value, indent=1) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Writes a text that replaces the file at once."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
