"""A run that is to be continued: its folder, what it was told, and from where it goes on."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainers.config import Config
from trainers.config.errors import ConfigError
from trainers.config.io import ConfigFile
from trainers.config.resumed import load_resumed
from trainers.run_folder.checkpoint import checkpoint_epoch, latest_checkpoint
from trainers.run_folder.folder import RunError, RunFolder, read_metrics
from trainers.run_folder.python_runs import refuse_objects


@dataclass(frozen=True, kw_only=True)
class Resume:
    """A run to continue.

    Attributes:
        folder: Its folder.
        saved: Its configuration so far.
        config: The one to continue with, which differs in keys that may change.
        checkpoint: Name of the checkpoint to go on from; None takes the newest.
        accept: What may be another one than the run began with, or damaged: `model`, `evaluations`.
    """

    folder: RunFolder
    saved: Config
    config: Config
    checkpoint: str | None = None
    accept: Collection[str] = ()

    @classmethod
    def read(
        cls,
        run: Path,
        overrides: Sequence[str] = (),
        *,
        given: str | None = None,
        checkpoint: str | None = None,
        accept: Collection[str] = (),
    ) -> "Resume":
        """Reads a run folder for a command.

        Args:
            run: The run folder.
            overrides: `--key value` tokens for keys that may change; see `trainers.config.resumed`.
            given: A configuration that the run is to have from now on; None keeps the saved one.
            checkpoint: Name of the checkpoint folder; None takes the newest.
            accept: As the attribute.

        Raises:
            ConfigError: A key changes that may not.
            RunError: There is no such run, or it was started from Python with objects of its own.
        """
        folder = RunFolder.open(run)
        refuse_objects(folder.path)
        saved, config = load_resumed(ConfigFile.read(folder.config_file), overrides, given=given)
        return cls(folder=folder, saved=saved, config=config, checkpoint=checkpoint, accept=accept)

    def source(self) -> Path | None:
        """The checkpoint to go on from; None at the start, where the newest is asked for and there is none yet.

        Raises:
            ConfigError: The configuration ends before it.
            RunError: There is none any more, though the run has saved some.
        """
        nothing = self.checkpoint is None and latest_checkpoint(self.folder.path) is None
        if nothing:
            self._check_never_saved()
        source = None if nothing else self.folder.checkpoint(self.checkpoint)
        done = 0 if source is None or not source.is_dir() else checkpoint_epoch(source)
        if done > self.config.epochs:
            raise ConfigError(
                f"epochs must be at least {done}, which {source} has finished, got {self.config.epochs}; give more "
                f"with --epochs, or go on from an earlier one with --checkpoint"
            )
        return source

    def _check_never_saved(self) -> None:
        """Refuses to start again where that would overwrite what is left of checkpoints that are gone."""
        rows = read_metrics(self.folder.path) if self.folder.metrics_path.is_file() else []
        done, every = max((row["epoch"] for row in rows), default=0), self.saved.checkpoints.every_epochs
        looks_saved = not self.folder.never_saved and (done >= self.saved.epochs or 0 < every <= done)
        if self.folder.lora.exists() or looks_saved:
            raise RunError(
                f"{self.folder.path} has finished {done} epochs, but none of its checkpoints is left to go on from: "
                "put its folder checkpoints/ back, or start a new run with another run.name; nothing here was changed"
            )
