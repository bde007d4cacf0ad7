"""Scores that are exact functions of the pixels: sharpness, colourfulness, entropy, symmetry.

    sharpness       Var over interior pixels of the Laplacian of luma,  L = y[i-1] + y[i+1] + y[j-1] + y[j+1] - 4 y
    colourfulness   sqrt(Var rg + Var yb) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2),  rg = R - G,  yb = (R + G) / 2 - B
    entropy         - sum_v p_v log2 p_v over the 256 grey levels of the picture
    symmetry        1 - mean |x - mirrored x|, mirrored left to right

Luma is Rec. 601. Variances divide by the number of pixels. Colourfulness is in the units of its paper (channels from 0
to 255). All but the entropy are differentiable; where a square root or an absolute value has a kink, the gradient is 0.
Each is easily exploited when it is the only reward (noise is sharp, flat pictures are symmetric): use it as one term.
Legend: `B` batch, `H` height, `W` width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rewards.base import Metadata, UserError
from rewards.builtin.color import LUMA
from rewards.card import Card
from rewards.registry import register

LEVELS = 256
# Every pixel has rg^2 + yb^2 <= 5/4, so the total of variances and squared means is at most 5/4; the best split between
# spread and mean, a sqrt(1 + 0.3^2) gain, is reached by mixing red and cyan.
COLOURFULNESS_MAX = 255 * math.sqrt(1.25 * (1 + 0.3**2))


@register(
    differentiable=True,
    range=(0.0, 16.0),
    card=Card(
        origin="Pech-Pacheco et al., ICPR 2000 (variance of the Laplacian)",
        licence="definition",
        typical="below 0.001 blurred, 0.006-0.03 photograph, 0.74 uniform noise",
    ),
)
def sharpness(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
    """Variance of the Laplacian of luma; blur lowers it."""
    if min(images.shape[-2:]) < 3:
        raise UserError(f"sharpness needs images of at least 3 x 3 pixels, got {tuple(images.shape[-2:])}")
    y = luma(images)
    around = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:]
    return (around - 4 * y[:, 1:-1, 1:-1]).var(dim=(1, 2), correction=0)


@register(
    differentiable=True,
    range=(0.0, COLOURFULNESS_MAX),
    card=Card(
        origin="Hasler & Suesstrunk, SPIE 2003",
        licence="definition",
        typical="0 grey, 15 slightly, 45 averagely, 82 highly, 109 extremely colourful (their survey)",
    ),
)
def colourfulness(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
    """Spread and mean of the opponent colours red-green and yellow-blue."""
    red, green, blue = (255 * images).unbind(dim=1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue], dim=1).flatten(2)  # (B, 2, H W)
    mean = opponents.mean(dim=2, keepdim=True)
    spread = torch.linalg.vector_norm(opponents - mean, dim=(1, 2)) / math.sqrt(opponents.shape[2])
    return spread + 0.3 * torch.linalg.vector_norm(mean, dim=(1, 2))


@register(
    range=(0.0, math.log2(LEVELS)),
    card=Card(origin="Shannon 1948, of the grey histogram", licence="definition", typical="0 flat, 6.5-7.7 photograph"),
)
def entropy(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
    """Bits per pixel of the histogram of the 256 grey levels."""
    levels = (luma(images.detach().float()) * (LEVELS - 1)).round().long().clamp(0, LEVELS - 1)
    counts = torch.stack([torch.bincount(level.flatten(), minlength=LEVELS) for level in levels])
    shares = counts.double() / counts.sum(dim=1, keepdim=True)
    return torch.special.entr(shares).sum(dim=1) / math.log(2)


@register(
    differentiable=True,
    range=(0.0, 1.0),
    card=Card(
        origin="mean absolute difference to the mirror image",
        licence="definition",
        typical="0.67 uniform noise, 0.65-0.9 photograph, 1 mirrored or flat",
    ),
)
def symmetry(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
    """How alike an image and its left-right mirror image are."""
    return 1 - (images - images.flip(-1)).abs().mean(dim=(1, 2, 3))


def luma(images: Tensor) -> Tensor:
    """Rec. 601 luma: `(B, 3, H, W)` to `(B, H, W)`."""
    return (images * images.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1)
