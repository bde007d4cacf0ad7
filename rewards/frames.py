"""Which frames of a video a reward is given: `middle`, one picture; `all`; `every 4`, from the first on.

Legend: `B` batch, `F` frames.
"""

from __future__ import annotations

import re

from torch import Tensor

from rewards.base import RewardError, UserError

MIDDLE = "middle"


def check_frames(frames: object, what: str) -> None:
    """Raises UserError unless these name frames."""
    if not isinstance(frames, str) or (frames not in (MIDDLE, "all") and _stride(frames) is None):
        raise UserError(f"{what}: frames must be 'middle', 'all' or 'every N' with N from 1 on, got {frames!r}")


def middle_frame(images: Tensor) -> Tensor:
    """Pictures `(B, 3, H, W)`: as they are, or the middle frame of videos `(B, F, 3, H, W)`."""
    return images if images.ndim == 4 else images[:, images.shape[1] // 2]


def chosen_frames(images: Tensor, frames: str, *, reward: str) -> Tensor:
    """What a reward is given of pictures `(B, 3, H, W)` or videos `(B, F, 3, H, W)`.

    Args:
        images: In [0, 1].
        frames: What it takes.
        reward: Its name, for messages.

    Returns:
        `(B, 3, H, W)` for `middle`, else `(B, F, 3, H, W)`.

    Raises:
        RewardError: It takes videos and is given single pictures.
    """
    if frames == MIDDLE:
        return middle_frame(images)
    if images.ndim == 4:
        raise RewardError(
            f"reward {reward!r} scores videos (frames: {frames}) and was given single pictures: it works in training "
            "and evaluation, in the training process itself; not in reward processes or servers, for steering, for "
            "gradients or on picture files"
        )
    return images[:, :: _stride(frames) or 1]


def _stride(frames: str) -> int | None:
    found = re.fullmatch(r"every ([1-9]\d*)", frames)
    return int(found[1]) if found else None
