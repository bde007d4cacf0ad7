"""Judged pictures: files, or cells of a dataset, which are read when they are needed."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpo.pipeline.input_images import InputImageError, fit, read_image


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A picture in a Hugging Face dataset.

    Attributes:
        data: The dataset.
        row: Of the dataset.
        column: Holds encoded images, or what the dataset decodes itself.
    """

    data: object
    row: int
    column: str

    def __str__(self) -> str:
        return f"row {self.row}, {self.column}"

    def read(self) -> bytes | Image.Image:
        """What is in it."""
        found = self.data[self.row][self.column]  # type: ignore[index]
        if isinstance(found, bytes | Image.Image):
            return found
        raise InputImageError(f"{self} must hold an image, got {type(found).__name__}")


Judged = Path | Cell


def open_picture(picture: Judged) -> Image.Image:
    """A picture as 8-bit RGB.

    Raises:
        InputImageError: It cannot be read; the message names it.
    """
    if isinstance(picture, Path):
        return read_image(picture)
    found = picture.read()
    if isinstance(found, Image.Image):
        return read_image(found)
    try:
        return read_image(Image.open(io.BytesIO(found)))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputImageError(f"{picture} cannot be read as an image: {error}") from error


def size_of(picture: Path) -> tuple[int, int]:
    """Width and height of a file in pixels, from its header."""
    with Image.open(picture) as opened:
        return opened.size


def digest(picture: Judged) -> str:
    """A text that is equal for equal pictures: a hash of the file, or of the pixels of what comes decoded."""
    found = picture.read_bytes() if isinstance(picture, Path) else picture.read()
    content = found if isinstance(found, bytes) else f"{found.mode} {found.size}".encode() + found.tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """The middle of an image at `size` = (width, height), (1, 3, H, W) float32 in [0, 1]; nothing is stretched."""
    values = np.asarray(fit(image, size), dtype=np.float32) / 255
    return torch.from_numpy(values).permute(2, 0, 1)[None].contiguous()
