"""Toy rewards on colour: cheap, differentiable, and easy to see at work.

    brightness  mean of Rec. 601 luma, 0.299 R + 0.587 G + 0.114 B, over pixels
    redness     mean over pixels of R - (G + B) / 2; greenness and blueness likewise

Both are linear in the pixels, so their gradient is known exactly.
"""

from __future__ import annotations

from torch import Tensor

from rewards.base import Metadata
from rewards.card import Card
from rewards.registry import register

LUMA = (0.299, 0.587, 0.114)
_BALANCE = Card(origin="difference of channel means", licence="definition", typical="-0.3 to 0.35 photograph")


def weighted_mean(images: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """Mean over pixels of a weighted sum of channels: `(B, 3, H, W)` to `(B,)`."""
    return (images * images.new_tensor(weights).view(1, 3, 1, 1)).sum(dim=1).mean(dim=(1, 2))


@register(
    differentiable=True,
    range=(0.0, 1.0),
    card=Card(origin="Rec. 601", licence="definition", typical="0.2-0.5 photograph"),
)
def brightness(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
    """Mean luma of the image."""
    return weighted_mean(images, LUMA)


@register(differentiable=True, range=(-1.0, 1.0), card=_BALANCE)
def redness(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
    """How much red exceeds the mean of green and blue."""
    return weighted_mean(images, (1.0, -0.5, -0.5))


@register(differentiable=True, range=(-1.0, 1.0), card=_BALANCE)
def greenness(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
    """How much green exceeds the mean of red and blue."""
    return weighted_mean(images, (-0.5, 1.0, -0.5))


@register(differentiable=True, range=(-1.0, 1.0), card=_BALANCE)
def blueness(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
    """How much blue exceeds the mean of red and green."""
    return weighted_mean(images, (-0.5, -0.5, 1.0))
