"""The verifier of shapes as rewards: exact, 1 ms a picture, no network.

shapes          (strict + partial) / 2, with both as components: a dense signal that still pays for being right
shapes_strict   1 where everything is as the caption says and nothing is extra, else 0
shapes_partial  the share of the caption's requirements that is met
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewards.base import Metadata
from rewards.builtin.shapes.verifier import Verdict, verify
from rewards.card import Card
from rewards.registry import register

_CARD = Card(origin="this package", licence="definition", typical="0 wrong, 1 right")


@register(range=(0.0, 1.0), card=_CARD, description="Shapes as the caption says: mean of strict and partial.")
def shapes(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> dict[str, Tensor]:
    """Scores shapes against captions, densely.

    Args:
        images: (B, 3, H, W) float RGB in [0, 1], H and W multiples of 32.
        prompts: B captions of the grammar of `rewards.builtin.shapes.scene`.
        metadata: Unused.

    Returns:
        (B,) float32 tensors in [0, 1]: "score", the mean of "strict" and "partial".
    """
    verdict = _verify(images, prompts)
    strict, partial = torch.from_numpy(verdict.strict), torch.from_numpy(verdict.partial)
    return {"score": (strict + partial) / 2, "strict": strict, "partial": partial}


@register(
    range=(0.0, 1.0), card=_CARD, description="1 where the picture shows exactly the shapes of the caption, else 0."
)
def shapes_strict(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
    """Returns (B,) float32, 1 where the picture shows exactly what the caption says."""
    return torch.from_numpy(_verify(images, prompts).strict)


@register(range=(0.0, 1.0), card=_CARD, description="Share of the caption's requirements that the picture meets.")
def shapes_partial(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
    """Returns (B,) float32 in [0, 1], the share of the caption's requirements that is met."""
    return torch.from_numpy(_verify(images, prompts).partial)


def _verify(images: Tensor, prompts: list[str]) -> Verdict:
    return verify(images.detach().float().cpu().numpy(), prompts)
