"""A run folder: everything one training run leaves behind, readable without this package.

<output_dir>/<name>/
  config.yaml        the resolved configuration
  files.json         see `trainers.run_folder.ledger`: what was written, to compare whatever is read back
  environment.json   versions, machine, git commit, command line, start time; one more entry per resume
  model.json         see `trainers.run_folder.model_record`
  rewards.json       see `trainers.run_folder.reward_record`
  prompts.json       see `trainers.run_folder.prompt_record`
  objects.json       of a run started from Python, see `trainers.run_folder.python_runs`
  terminal.log       see `trainers.tracking.terminal`
  metrics.jsonl      one JSON object per epoch, appended as the run goes
  pictures/          sample grids
  checkpoints/       see `trainers.run_folder.checkpoint`
  evaluations/       values and images of every evaluation, and a summary of each as JSON
  best/              the weights of the best evaluation, where over-optimisation may stop the run
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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from PIL import Image

from ddpo.validation import UserError
from trainers.run_folder import ledger
from trainers.run_folder.checkpoint import CheckpointError, latest_checkpoint
from trainers.run_folder.environment import describe_environment
from trainers.run_folder.epochs import epoch_in, epoch_name

CONFIG = "config.yaml"
BEST = "best"
ENVIRONMENT = "environment.json"
FIRST_CHECKPOINT = "first_checkpoint"
METRICS = "metrics.jsonl"
HIDDEN = re.compile(r"\.(partial|removed)_[0-9a-f]{32}")
_VALID_NAME = re.compile(r"\w[\w.+=-]*")

Metric = float | int | str | bool | None | Sequence[float]


class RunError(UserError):
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
            name: Folder name, which must be free or an empty folder; None for `<UTC time>_<stem>`, with a counter if
                that is taken.
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
        self.save_json(ENVIRONMENT, {**describe_environment(), FIRST_CHECKPOINT: None})
        self.metrics_path.touch()
        for folder in (self.pictures, self.checkpoints):
            folder.mkdir()
        self.save_config(config_yaml)

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """The existing run at `path`.

        Raises:
            RunError: There is none; the message names the runs beside it.
        """
        path = Path(path)
        if (reason := ledger.misfit(path, CONFIG)) is not None:
            copy = ledger.copy_of(path, CONFIG)
            cure = "put it back" if copy is None else f"put it back with: cp {copy} {path / CONFIG}"
            raise RunError(f"{reason}: {cure}, and give what is to change as --key value")
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
    def config_file(self) -> Path:
        """The configuration that the run was started with, or resumed with since."""
        return self.path / CONFIG

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

    def checkpoint(self, name: str | None = None) -> Path:
        """The checkpoint folder of that name, or the newest.

        Raises:
            CheckpointError: There is none yet.
        """
        found = latest_checkpoint(self.path) if name is None else self.checkpoints / name
        if found is None:
            raise CheckpointError(
                f"{self.path} has no checkpoint yet; the first comes after checkpoints.every_epochs epochs"
            )
        return found

    @property
    def evaluations(self) -> Path:
        """Folder of evaluations; made by whoever writes them."""
        return self.path / "evaluations"

    def evaluation(self, epoch: int) -> Path:
        """File of the evaluation after so many finished epochs."""
        return self.evaluations / f"{epoch_name(epoch)}.safetensors"

    def evaluated(self, epoch: int) -> Path:
        """File of an evaluation, once it is found as it was written.

        Raises:
            RunError: It is damaged or missing.
        """
        file = self.evaluation(epoch)
        if (reason := ledger.misfit(self.path, self.relative(file))) is not None:
            raise RunError(
                f"{reason}: put it back, or go on without it by ddpo train --resume {self.path} --accept evaluations"
            )
        return file

    def relative(self, path: Path) -> str:
        """The name of a file of the run in its record of files."""
        return path.relative_to(self.path).as_posix()

    def evaluated_epochs(self) -> list[int]:
        """Finished epochs of the evaluations that there are, rising."""
        found = (epoch_in(path.stem) for path in self.evaluations.glob("*.safetensors"))
        return sorted(epoch for epoch in found if epoch is not None)

    def discard_evaluations(self, *, after_epoch: int) -> None:
        """Removes later evaluations and best weights, which a run resumed from that epoch no longer continues."""
        for epoch in self.evaluated_epochs():
            if epoch > after_epoch:
                self.discard_evaluation(epoch)
        self._remove_best(lambda epoch: epoch > after_epoch)

    def discard_evaluation(self, epoch: int) -> None:
        """Removes one evaluation."""
        files = [self.evaluation(epoch).with_suffix(suffix) for suffix in (".safetensors", ".json")]
        for file in files:
            file.unlink(missing_ok=True)
        ledger.forget(self.path, *map(self.relative, files))  # after a kill before this they are missing, and told so

    def best(self, epoch: int) -> Path:
        """Folder of the weights after so many epochs, where they are the best ones; made by whoever writes them."""
        return self.path / BEST / epoch_name(epoch)

    def best_weights(self) -> Path | None:
        """Folder of the best evaluation's weights, found as they were written, or None when there is none.

        Raises:
            RunError: They are damaged.
        """
        best = max((self.path / BEST).glob("epoch_*"), default=None)
        for name in () if best is None else self._noted_in(best):
            if (reason := ledger.misfit(self.path, name)) is not None:
                raise RunError(f"{reason}: put it back, or remove {best} to do without the best weights")
        return best

    def keep_best(self, epoch: int) -> None:
        """Notes the best weights, and removes those of all other evaluations."""
        files = [path for path in self.best(epoch).rglob("*") if path.is_file()]
        ledger.note(self.path, *map(self.relative, files))
        self._remove_best(lambda other: other != epoch)

    def _noted_in(self, folder: Path) -> list[str]:
        """Names of the files below a folder that are noted."""
        return [name for name in ledger.recorded(self.path) if (self.path / name).is_relative_to(folder)]

    def _remove_best(self, is_doomed: Callable[[int], bool]) -> None:
        for path in (self.path / BEST).glob("epoch_*"):
            epoch = epoch_in(path.name)
            if epoch is not None and is_doomed(epoch):
                ledger.forget(self.path, *self._noted_in(path))
                shutil.rmtree(path)

    @property
    def lora(self) -> Path:
        """Folder of the final weights; made by whoever writes them."""
        return self.path / "lora"

    def save_config(self, config_yaml: str) -> None:
        """Replaces the configuration at once."""
        with ledger.noted(self.path, CONFIG) as partial:
            partial.write_text(config_yaml, encoding="utf-8")

    def save_json(self, name: str, value: object) -> None:
        """Writes a value as JSON to a file that is noted; it replaces what stood there at once."""
        with ledger.noted(self.path, name) as partial:
            partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

    def note_resume(self, checkpoint: str) -> None:
        """Adds the present environment, and the checkpoint taken up, to environment.json; begins it anew if damaged."""
        environment = self.environment()
        resumed = [*environment.get("resumed", []), {"checkpoint": checkpoint, **describe_environment()}]
        self.save_json(ENVIRONMENT, {**environment, "resumed": resumed})

    def environment(self) -> dict[str, Any]:
        """What environment.json says; nothing where it is damaged."""
        with suppress(OSError, ValueError):
            read = json.loads((self.path / ENVIRONMENT).read_text(encoding="utf-8"))
            return read if isinstance(read, dict) else {}
        return {}

    def note_checkpoint(self, name: str) -> None:
        """Notes the first checkpoint, so that a run that has lost all of them is told from one that never had any."""
        environment = self.environment()
        if environment.get(FIRST_CHECKPOINT) is None:
            self.save_json(ENVIRONMENT, {**environment, FIRST_CHECKPOINT: name})

    @property
    def never_saved(self) -> bool:
        """Whether the run is known never to have had a checkpoint; runs of earlier versions do not say."""
        return self.environment().get(FIRST_CHECKPOINT, ...) is None

    def save_picture(self, image: Image.Image, name: str) -> Path:
        """Writes `pictures/<name>.png`, visible only when complete, and returns its path."""
        path = self.pictures / f"{name}.png"
        with ledger.replaced(path) as partial:
            image.save(partial, format="png")
        return path

    def append_metrics(self, row: Mapping[str, Metric]) -> None:
        """Appends one epoch's metrics as a line and hands it to the operating system before returning.

        Args:
            row: Must have an integer "epoch". Floats are written bit-exactly; NaN and infinities, which JSON lacks,
                as null; sequences as lists.
        """
        assert isinstance(row["epoch"], Integral), "a row of metrics needs its epoch"
        line = json.dumps({key: _jsonable(key, value) for key, value in row.items()}, allow_nan=False) + "\n"
        with ledger.told(
            self.metrics_path, intact=f"go on from the newest checkpoint: ddpo train --resume {self.path}"
        ):
            _drop_partial_line(self.metrics_path)
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(line)

    def restore_metrics(self, checkpoint: Path | None, *, after_epoch: int) -> str | None:
        """Keeps the rows that the checkpoint taken up has seen: its copy, or those up to its epoch where it has none.

        Returns:
            A line to show where the file was another one; None where it was not.

        Raises:
            RunError: There is no copy, and the file is damaged.
        """
        copy = None if checkpoint is None else checkpoint / ledger.COPIES / METRICS
        if copy is None or not copy.is_file():
            kept = [row for row in read_metrics(self.path) if row["epoch"] <= after_epoch]
            ledger.replace_text(self.metrics_path, "".join(json.dumps(row) + "\n" for row in kept))
            return None
        seen = copy.read_bytes()
        present = self.metrics_path.read_bytes() if self.metrics_path.is_file() else b""
        ledger.replace_text(self.metrics_path, seen.decode())
        if present.startswith(seen):
            return None
        return f"warning: {self.metrics_path} was not what the run wrote: put back from {copy}"


def read_metrics(run: str | Path) -> list[dict]:
    """Rows of a run's metrics.jsonl, oldest first, without a last line that is only half written.

    Raises:
        RunError: There is no such file, or a line other than the last is damaged.
    """
    path = Path(run) / METRICS
    if not path.is_file():
        raise RunError(f"{run} has no {METRICS}: is it a run folder?")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("epoch"), int):
                raise ValueError("it is no row with an epoch")
            rows.append(row)
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
    """Renames a folder unless the target is a file or a folder with files in it; returns whether it did."""
    try:
        folder.rename(path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    return True
