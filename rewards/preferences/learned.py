"""A reward learnt from preferences by `ddpo rewards fit`: an ensemble's mean, less a penalty on its disagreement.

    score = mean_k r_k(x) - pessimism * std_k r_k(x)

With pessimism, pictures unlike those that were compared, on which the members disagree, are not worth finding: a
policy that optimises a learnt reward otherwise seeks out its errors (Coste et al. 2024, arXiv:2310.02743).
The unit is log-odds: a difference of 1 between two pictures of one prompt says 73% prefer the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from rewards.base import Metadata, UserError
from rewards.card import Card, part_of
from rewards.preferences.ensemble import Ensemble, read_config
from rewards.registry import register

_TINY = 1e-12  # keeps the gradient of the standard deviation finite where all members agree


_ALIKE = {"imagenet": "imagenet_class", "open_clip": "clip_score"}  # rewards that need an encoder's packages


def _same_packages(options: Mapping[str, object]) -> list[tuple[str, Mapping[str, object]]]:
    path = options.get("path")
    kind = read_config(Path(path).expanduser()).encoder.partition(":")[0] if isinstance(path, str) else ""
    return part_of(_ALIKE.get(kind), {})


@register(
    "learned",
    differentiable=True,
    range=(-float("inf"), float("inf")),
    card=Card(
        origin="ddpo rewards fit, on your own pairs (Bradley & Terry 1952; Christiano et al., arXiv:1706.03741)",
        licence="yours, and that of the frozen encoder if one is used",
        typical="a few log-odds around 0",
        parts=_same_packages,
    ),
)
@final
class Learned:
    """Log-odds of being preferred, learnt from labelled pairs.

    Args:
        device: Where the networks run.
        path: Folder that `ddpo rewards fit` wrote.
        pessimism: Standard deviations of the ensemble taken off; 0 for the mean.

    Raises:
        UserError: No such ensemble, or a negative pessimism.
    """

    def __init__(self, *, device: torch.device, path: str, pessimism: float = 0.0) -> None:
        if not pessimism >= 0:
            raise UserError(f"reward 'learned': pessimism must be at least 0, got {pessimism}")
        self.ensemble = Ensemble.load(Path(path).expanduser(), device=device)
        if pessimism > 0 and len(self.ensemble.members) < 2:
            raise UserError(
                f"reward 'learned': pessimism {pessimism} needs an ensemble, {path} has 1 member; fit with --members 4"
            )
        self._pessimism = pessimism

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> dict[str, Tensor]:
        """Scores `(B,)` in log-odds, with the ensemble's mean and standard deviation as components."""
        scores = self.ensemble.scores(images, prompts)
        mean = scores.mean(0)
        std = (scores.var(0, correction=0) + _TINY).sqrt()
        return {"score": mean - self._pessimism * std, "mean": mean, "std": std}
