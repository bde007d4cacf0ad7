"""Pictures of any kind as 8-bit RGB, as a viewer shows them.

Turned upright as EXIF says, 16-bit grey brought to 8 bits, transparent pixels on white.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_LEVELS = 257  # 16-bit levels in an 8-bit one: 65535 / 255


def open_rgb(path: Path) -> Image.Image:
    """A picture file as 8-bit RGB.

    Raises:
        ValueError: PIL cannot read it.
    """
    try:
        with Image.open(path) as picture:
            return to_rgb(picture)
    except Exception as error:  # damaged files make PIL raise many kinds
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


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
