"""An estimate of a picture's size as JPEG that has a gradient: the codec's own steps, with a formula for its last one.

    pixels, rounded to 8 bits -> Y, Cb, Cr, the chroma at half size -> 8 x 8 blocks -> DCT -> q = round(c / Q)
    bits = sum over AC of (2 log2(1 + |q|) + 1.5 min(|q|, 1)) + the same of DC differences to the block before
           + 4 a block of luma, 2 of chroma for its end

(ITU-T T.81). Roundings are straight-through: their values are those of the codec, their gradients those of what is
rounded. In place of Huffman's codes stands the formula: a coefficient of n binary digits is sent as n bits after a code
of about n + 1.5. A coefficient that is rounded to 0 costs nothing and has no gradient. Q are libjpeg's tables for the
same quality as `jpeg_compressibility`. How well the estimate ranks pictures: `python -m scripts.jpeg_estimate`.

Legend: `B` batch, `N` blocks of a picture.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from rewards.base import Metadata
from rewards.builtin.color import LUMA
from rewards.builtin.jpeg import BYTES_PER_KB, QUALITY
from rewards.card import Card
from rewards.images.straight_through import rounded
from rewards.registry import register

BLOCK = 8
HALF = 1e-3  # by which numbers are lifted before they are rounded
HEADER_BYTES = 623  # of PIL's files in colour
CHROMA_BLUE, CHROMA_RED = (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312)  # JFIF
# ITU-T T.81, tables K.1 and K.2, in rows.
LUMINANCE = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29,
    51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120,
    101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
CHROMINANCE = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99,
    99, 99, 99, *[99] * 32,
)  # fmt: skip


def quantisation(table: tuple[int, ...], quality: int = QUALITY) -> Tensor:
    """A table for a quality of 50 or more, (8, 8), as libjpeg scales it."""
    scaled = (torch.tensor(table, dtype=torch.float32) * (200 - 2 * quality) + 50).div(100).floor()
    return scaled.clamp(1, 255).view(BLOCK, BLOCK)


def cosines() -> Tensor:
    """The orthonormal cosine transform of 8 values, (8, 8)."""
    places = torch.arange(BLOCK, dtype=torch.float64)
    basis = torch.cos((2 * places + 1) * places[:, None] * math.pi / (2 * BLOCK)) * math.sqrt(2 / BLOCK)
    basis[0] /= math.sqrt(2)
    return basis.float()


def estimated_kilobytes(images: Tensor) -> Tensor:
    """Estimated size of each image as JPEG, kB of 1000 bytes, with a gradient.

    Args:
        images: `(B, 3, H, W)` in [0, 1].

    Returns:
        `(B,)` float32.
    """
    pixels = rounded(images.float() * 255)
    height, width = pixels.shape[-2:]
    pixels = functional.pad(pixels, (0, -width % (2 * BLOCK), 0, -height % (2 * BLOCK)), mode="replicate")
    luma, *chroma = (
        torch.einsum("bchw,c->bhw", pixels, pixels.new_tensor(weights)) for weights in (LUMA, CHROMA_BLUE, CHROMA_RED)
    )
    bits = _bits(luma - 128, quantisation(LUMINANCE), end=4.0)
    for channel in chroma:
        bits = bits + _bits(functional.avg_pool2d(channel, 2), quantisation(CHROMINANCE), end=2.0)
    return (HEADER_BYTES + bits / 8) / BYTES_PER_KB


def _bits(channel: Tensor, table: Tensor, *, end: float) -> Tensor:
    """Bits of a channel (B, H, W), H and W multiples of 8, `(B,)`."""
    blocks = channel.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).transpose(2, 3).flatten(1, 2)  # (B, N, 8, 8)
    basis = cosines().to(channel)
    steps = _nearest(basis @ _nearest(blocks) @ basis.T / table.to(channel)).flatten(2)
    constant, others = steps[..., 0], steps[..., 1:]
    differences = torch.diff(constant, prepend=torch.zeros_like(constant[:, :1]))
    return _cost(others).sum((1, 2)) + _cost(differences).sum(1) + end * steps.shape[1]


def _nearest(x: Tensor) -> Tensor:
    """Rounded with halves up, even where they are halves but for the rounding of float32."""
    return rounded(x + HALF)


def _cost(steps: Tensor) -> Tensor:
    """Bits of whole numbers of any shape."""
    size = steps.abs()
    return 2 * torch.log2(1 + size) + 1.5 * size.clamp(max=1)


@register(
    differentiable=True,
    range=(-float("inf"), 0.0),
    card=Card(
        origin="ITU-T T.81; the size of jpeg_compressibility, estimated",
        licence="definition",
        typical="in kB: within 10% of jpeg_compressibility",
    ),
)
def jpeg_estimate(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
    """Minus the estimated size in kB of the image as JPEG of quality 95."""
    return -estimated_kilobytes(images)
