"""Puts saved weights into a network that trains the same ones, whole or split over processes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from trainers.parallel.sharding import split_like
from trainers.run_folder.checkpoint import CheckpointError


@torch.no_grad()
def copy_saved(targets: Mapping[str, Tensor], saved: Mapping[str, Tensor], *, what: str) -> None:
    """Overwrites tensors with the saved ones of the same names and shapes.

    Args:
        targets: What is overwritten, by name.
        saved: Whole tensors, the same on every process.
        what: What the saved ones are called in a checkpoint, such as `weights`.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    wrong = [name for name in targets if name not in saved or saved[name].shape != targets[name].shape]
    if wrong or len(saved) != len(targets):
        raise CheckpointError(
            f"the checkpoint's {what} do not fit this configuration ({len(saved)} tensors for {len(targets)}"
            + (f", first misfit {wrong[0]}" if wrong else "")
            + "); resume with the adapter and model that the run was started with"
        )
    for name, value in targets.items():
        value.copy_(split_like(saved[name], value))
