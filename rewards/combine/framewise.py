"""A reward for pictures as one for videos: every frame is scored, and the frames' scores become one.

mean    (1/F) sum_f r(frame f)       the video as a whole
min     min_f r(frame f)             its worst frame: one broken frame cannot be paid for by others
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, final

import torch
from torch import Tensor

from rewards.base import Metadata, UserError, total_and_parts
from rewards.card import Card, part_of
from rewards.description import DescribedReward, Description
from rewards.frames import MIDDLE
from rewards.registry import register, resolve


def _parts(options: Mapping[str, object]) -> list[tuple[str, Mapping[str, object]]]:
    return part_of(options.get("reward"), options.get("options"))


@register(
    "framewise",
    frames="all",
    range=(-float("inf"), float("inf")),
    card=Card(origin="this package", licence="definition", typical="those of the reward", parts=_parts),
)
@final
class Framewise(DescribedReward):
    """The mean or the worst of a picture reward over a video's frames.

    Args:
        device: For a reward with weights.
        reward: A reward for pictures.
        over: `mean` or `min`.
        frames: `all`, or `every N`.
        options: Of the reward.

    Raises:
        UserError: The reward compares pictures or scores videos itself, or `over` is another word.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        reward: str,
        over: Literal["mean", "min"] = "mean",
        frames: str = "all",
        options: Mapping[str, object] | None = None,
    ) -> None:
        self._reward = resolve(reward, device=device, options=options or {})
        if self._reward.groupwise or self._reward.frames != MIDDLE:
            kind = "compares the pictures of a group" if self._reward.groupwise else "scores videos itself"
            raise UserError(f"reward 'framewise': reward must score single pictures, but {reward!r} {kind}")
        if over not in ("mean", "min"):
            raise UserError(f"reward 'framewise': over must be mean or min, got {over!r}")
        if frames == MIDDLE:
            raise UserError(f"reward 'framewise': frames must be all or every N, got {frames!r}")
        self._over, self._frames = over, frames

    def describe(self) -> Description:
        """In the range of the reward."""
        return Description(range=self._reward.range, frames=self._frames)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor | dict[str, Tensor]:
        """Scores `(B,)` of videos `(B, F, 3, H, W)`, and the mean over frames of the reward's components."""
        count = images.shape[1]
        of_frames = self._reward.compute(
            images.flatten(0, 1),
            [p for p in prompts for _ in range(count)],
            [m for m in metadata for _ in range(count)],
        )
        totals = of_frames.total.unflatten(0, (-1, count))
        parts = {name: values.unflatten(0, (-1, count)).mean(1) for name, values in of_frames.components.items()}
        return total_and_parts(totals.mean(1) if self._over == "mean" else totals.amin(1), parts)
