"""File size as JPEG, the reward of DDPO's first experiments (Black et al. 2023, section 5.1).

    incompressibility = kB of the image saved by PIL as JPEG at quality 95,   1 kB = 1000 bytes,   compressibility = -kB

Pixels are rounded to uint8 first, as ddpo-pytorch's `rewards.py` does.
"""

from __future__ import annotations

from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from rewards.base import Metadata
from rewards.card import Card
from rewards.registry import register

QUALITY = 95
BYTES_PER_KB = 1000
_CARD = Card(
    origin="Black et al., arXiv:2305.13301",
    licence="definition",
    typical="in kB: 50-105 photograph of 0.15 to 0.3 megapixels, 9-10 of 128 x 128 pixels",
)


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Size of each image as JPEG.

    Args:
        images: `(B, 3, H, W)` in [0, 1].

    Returns:
        `(B,)` float32, kB of 1000 bytes.
    """
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to("cpu", torch.uint8)
    return torch.tensor([_jpeg_bytes(picture) / BYTES_PER_KB for picture in pixels], dtype=torch.float32)


def _jpeg_bytes(picture: Tensor) -> int:
    buffer = BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell()


@register(range=(-float("inf"), 0.0), card=_CARD)
def jpeg_compressibility(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
    """Minus the size in kB of the image as JPEG of quality 95."""
    return -jpeg_kilobytes(images)


@register(range=(0.0, float("inf")), card=_CARD)
def jpeg_incompressibility(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
    """The size in kB of the image as JPEG of quality 95."""
    return jpeg_kilobytes(images)
