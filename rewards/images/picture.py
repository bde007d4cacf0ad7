"""Pictures of any kind as 8-bit RGB, as a viewer shows them.

Turned upright as EXIF says, 16-bit grey brought to 8 bits, transparent pixels on white.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rewards.base import UserError

MAX_PIXELS = 1 << 26  # 8192 x 8192
_LEVELS = 257  # 16-bit levels in an 8-bit one: 65535 / 255


def open_rgb(path: Path) -> Image.Image:
    """A picture file as 8-bit RGB.

    Raises:
        UserError: PIL cannot read it, or it is too large.
    """
    try:
        with Image.open(path) as picture:
            check_size(picture.size)  # known before any pixel is decoded
            return to_rgb(picture)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # damaged files make PIL raise many kinds
        raise UserError(f"{path} cannot be read as an image: {error}") from error


def load_image(path: Path) -> Tensor:
    """Reads a picture file as `(1, 3, H, W)` float32 in [0, 1], shown as the module docstring says.

    Raises:
        UserError: PIL cannot read it.
    """
    pixels = np.asarray(open_rgb(path), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0).contiguous()


def check_size(size: tuple[int, int]) -> None:
    """Refuses a picture of (width, height) that would take gigabytes: a small file can hold a huge flat picture.

    Raises:
        UserError: It has more than `MAX_PIXELS`.
    """
    if size[0] * size[1] > MAX_PIXELS:
        raise UserError(
            f"a picture of {size[0]} x {size[1]} pixels is too large, at most {MAX_PIXELS} are read; shrink it"
        )


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture as 8-bit RGB; see the module docstring."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(upright, dtype=np.float32) / _LEVELS).round().astype(np.uint8)).convert(
            "RGB"
        )
    if "A" not in upright.getbands() and "transparency" not in upright.info:
        return upright.convert("RGB")
    layered = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
