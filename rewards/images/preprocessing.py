"""What image encoders expect, from images in [0, 1], with gradients: resize, crop or pad, normalise.

    shortest   shortest side to the target, then the centre is cropped          CLIP, open_clip
    longest    longest side to the target, then black bars fill the square       HPSv2
    squash     both sides to the target, the shape changes                       SigLIP, BLIP

The libraries' own pipelines work on 8-bit PIL pictures; here the resampling is torch's antialiased filter, which has
PIL's kernel (Keys 1981, a = -0.5 for bicubic), rows first and then columns, clamped to [0, 1] after each, as PIL's
8-bit pixels are. Without the clamp a bicubic filter hands encoders overshoot that no picture has, and an optimiser
would find it. What remains is PIL's rounding: a third of a grey level on average.
Legend: `B` batch, `H` height, `W` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

Fit = Literal["shortest", "longest", "squash"]
Filter = Literal["bicubic", "bilinear"]
Offset = Literal["nearest", "floor"]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From images in [0, 1] to the input of an encoder; differentiable.

    Attributes:
        size: `(height, width)` of the output in pixels.
        fit: How other shapes are brought to it.
        mean: Subtracted from each channel.
        std: Each channel is divided by it.
        resample: The antialiased filter.
        offset: Where a crop begins when half a pixel is left over: the nearest even pixel (torchvision, open_clip), or
            the one before (transformers).
    """

    size: tuple[int, int]
    fit: Fit = "shortest"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resample: Filter = "bicubic"
    offset: Offset = "nearest"

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size must be (height, width), both positive, got {self.size}")
        if self.fit not in get_args(Fit) or self.resample not in get_args(Filter):
            raise ValueError(f"fit must be one of {get_args(Fit)} and resample of {get_args(Filter)}, got {self}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    def __call__(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [0, 1] to normalised `(B, 3, *size)` in float32."""
        pixels = images.float()
        height, width = images.shape[-2:]
        if self.fit == "squash":
            fitted = resize(pixels, self.size, self.resample)
        elif self.fit == "shortest":
            target = _shortest(height, width, self.size)
            fitted = crop_centre(resize(pixels, target, self.resample), self.size, offset=self.offset)
        else:
            fitted = pad_centre(resize(pixels, _longest(height, width, self.size), self.resample), self.size)
        return normalise(fitted, self.mean, self.std)


def resize(images: Tensor, size: tuple[int, int], resample: Filter = "bicubic") -> Tensor:
    """Antialiased resampling to `(height, width)`, rows then columns; the same tensor when the size fits already."""
    for target in ((images.shape[-2], size[1]), size):
        if tuple(images.shape[-2:]) != tuple(target):
            images = functional.interpolate(images, size=target, mode=resample, antialias=True).clamp(0, 1)
    return images


def crop_centre(images: Tensor, size: tuple[int, int], *, offset: Offset = "nearest") -> Tensor:
    """The central `(height, width)`."""
    spare = [have - want for have, want in zip(images.shape[-2:], size, strict=True)]
    top, left = (round(pixels / 2) if offset == "nearest" else pixels // 2 for pixels in spare)
    return images[..., top : top + size[0], left : left + size[1]]


def pad_centre(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Black bars around to `(height, width)`; an odd pixel goes right and below."""
    height, width = (want - have for have, want in zip(images.shape[-2:], size, strict=True))
    return functional.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`(images - mean) / std` for each channel."""
    shape = (1, len(mean), 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def encode_uint8(images: Tensor) -> Tensor:
    """`(B, H, W, 3)` uint8 on the CPU, rounded, for libraries that take pictures; no gradient."""
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to("cpu", torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous()


def _shortest(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """The shape that covers `size`: exact on the axis that needs the larger factor, rounded down on the other."""
    if size[0] * width >= size[1] * height:
        return size[0], max(size[1], size[0] * width // height)
    return max(size[0], size[1] * height // width), size[1]


def _longest(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """The largest shape inside `size`."""
    scale = min(size[0] / height, size[1] / width)
    return max(1, round(height * scale)), max(1, round(width * scale))
