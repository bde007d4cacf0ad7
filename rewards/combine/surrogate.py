"""A reward's own scores with the gradient of another: for rewards with steps in them, or no gradient at all.

    rewards:
      - name: straight_through
        options: {score: jpeg_compressibility, gradient: jpeg_estimate}

What is reported, compared and evaluated is `score`; an objective that learns through the reward climbs `gradient`. That
raises `score` as far as the two agree, which `<name>/gradient` beside it shows.

Legend: `B` batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from rewards.base import TOTAL_KEY, Metadata, UserError
from rewards.card import Card, part_of
from rewards.description import DescribedReward, Description
from rewards.images.straight_through import straight_through
from rewards.registry import register, resolve


def _parts(options: Mapping[str, object]) -> list[tuple[str, Mapping[str, object]]]:
    return [
        part for name in ("score", "gradient") for part in part_of(options.get(name), options.get(f"{name}_options"))
    ]


@register(
    "straight_through",
    differentiable=True,
    range=(-float("inf"), float("inf")),
    card=Card(
        origin="Bengio et al., arXiv:1308.3432",
        licence="definition",
        typical="those of the reward that scores",
        parts=_parts,
    ),
)
@final
class StraightThrough(DescribedReward):
    """Scores of one reward with the gradient of another.

    Args:
        device: For rewards with weights.
        score: The reward that scores.
        gradient: The differentiable reward that takes its place in the backward pass; in the same unit.
        score_options: Of the first.
        gradient_options: Of the second.

    Raises:
        UserError: The second has no gradient.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        score: str,
        gradient: str,
        score_options: Mapping[str, object] | None = None,
        gradient_options: Mapping[str, object] | None = None,
    ) -> None:
        self._score = resolve(score, device=device, options=score_options or {})
        self._gradient = resolve(gradient, device=device, options=gradient_options or {})
        if not self._gradient.differentiable:
            raise UserError(
                f"reward 'straight_through': gradient must be a differentiable reward, got {gradient!r}; "
                "`ddpo rewards list` shows which are"
            )

    def describe(self) -> Description:
        """Of the reward that scores, but with a gradient."""
        groupwise = self._score.groupwise or self._gradient.groupwise
        return Description(differentiable=True, groupwise=groupwise, range=self._score.range)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> dict[str, Tensor]:
        """The score, and what the other reward says as `gradient`."""
        with torch.no_grad():
            hard = self._score.compute(images, prompts, metadata).total
        soft = self._gradient.compute(images, prompts, metadata).total
        return {TOTAL_KEY: straight_through(hard.to(soft.device), soft), "gradient": soft}
