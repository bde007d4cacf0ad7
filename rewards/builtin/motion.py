"""How evenly a video moves.

With frames x_f and the mean over pixels and colours,

    motion_smoothness = - mean_f mean |x_{f-1} - 2 x_f + x_{f+1}|,    f = 1 .. F - 2

the mean second difference in time: 0 for a still video and for one whose pixels change at a constant rate, negative for
flicker and jumps. Alone it is won by a still video, so weigh it against a reward that wants something in the picture.
"""

from __future__ import annotations

from torch import Tensor

from rewards.base import Metadata, RewardError
from rewards.card import Card
from rewards.registry import register


@register(
    "motion_smoothness",
    frames="all",
    range=(-2.0, 0.0),
    card=Card(
        origin="this package",
        licence="definition",
        typical="-0.02 a slow shot, -0.5 noise",
        caution="a still video gets the highest score",
    ),
)
def motion_smoothness(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
    """Minus the mean second difference of pixels in time; videos of at least 3 frames."""
    if images.shape[1] < 3:
        raise RewardError(f"reward 'motion_smoothness' needs 3 frames or more, got {images.shape[1]}: set num_frames")
    return -(images[:, :-2] - 2 * images[:, 1:-1] + images[:, 2:]).abs().mean((1, 2, 3, 4))
