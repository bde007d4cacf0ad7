"""Run folders that never finished an epoch: a new run of that name takes their place, and nothing of theirs is missed.

Only what is known to be one counts: a run folder with no finished epoch, no later checkpoint, no exported weights, no
file that runs do not write, and nobody at work in it.
"""

import shutil
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

from trainers.run_folder.checkpoint import checkpoint_epoch, list_checkpoints
from trainers.run_folder.folder import HIDDEN, RunError, RunFolder
from trainers.run_folder.lock import lock

_KNOWN = {
    "config.yaml", "environment.json", "files.json", "model.json", "objects.json", "prompts.json", "rewards.json",
    "prompts.jsonl", "metrics.jsonl", "tracking.json", "wandb_sent.txt", "pictures", "checkpoints", "evaluations",
    "best", "tensorboard", "wandb",
}  # fmt: skip
_OLD_SECONDS = 3600.0


def has_finished(run: RunFolder) -> bool:
    """Whether something of a run is worth keeping: a finished epoch, a checkpoint after one, exported weights."""
    rows = run.metrics_path.is_file() and bool(run.metrics_path.read_bytes().strip())
    later = any(checkpoint_epoch(path) > 0 for path in list_checkpoints(run.path))
    return rows or later or run.lora.exists() or any(epoch > 0 for epoch in run.evaluated_epochs())


def make_way(path: Path) -> str | None:
    """Removes the folder of a run that never finished an epoch, so that its name is free.

    Args:
        path: Where a new run is to be.

    Returns:
        What was done, for people; None where nothing was.

    Raises:
        RunError: A process is at work in it.
    """
    run = RunFolder(path=path)
    if not run.config_file.is_file() or has_finished(run):
        return None
    if any(entry.name not in _KNOWN and not entry.name.startswith(".") for entry in path.iterdir()):
        return None
    with ExitStack() as stack:
        owner = lock(run, stack)
        if owner is not None:
            raise RunError(f"{path} is being trained by another process ({owner}): choose another --run.name")
        remove(run)
    return f"{path} had no finished epoch: a new run takes its place"


def remove(run: RunFolder) -> None:
    """Removes a run folder; it is gone at once, whatever happens meanwhile."""
    hidden = run.path.with_name(f".removed_{uuid.uuid4().hex}")
    run.path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def sweep(output_dir: Path) -> None:
    """Removes hidden folders that killed starts and removals have left, an hour later."""
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        if HIDDEN.fullmatch(path.name) and path.is_dir() and time.time() - path.stat().st_mtime > _OLD_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
