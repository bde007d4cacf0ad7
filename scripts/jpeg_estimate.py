"""How well the differentiable estimate of a JPEG's size ranks pictures.

`python -m scripts.jpeg_estimate [PICTURE ...]`; without pictures: shapes of 32 x 32 pixels under noise and blur of many
strengths. Spearman's rank correlation with the real size, its range over parts of the set by size, and the mean ratio.
"""

import sys

import numpy as np
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from rewards.builtin.jpeg import jpeg_kilobytes
from rewards.builtin.jpeg_estimate import estimated_kilobytes
from rewards.builtin.shapes.render import render
from rewards.builtin.shapes.scene import sample_scene


def drawn_pictures(count: int = 400) -> list[Tensor]:
    """Shapes with noise of standard deviations up to .1, or blurred, (3, 32, 32) each."""
    random, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    pictures = []
    for number in range(count):
        picture = torch.from_numpy(render(sample_scene(random), random))
        if number % 2:
            picture = picture + 0.1 * float(random.random()) ** 2 * torch.randn(picture.shape, generator=generator)
        elif number % 4:
            size = int(random.integers(1, 5))
            picture = interpolate(avg_pool2d(picture[None], size), picture.shape[1:], mode="bilinear")[0]
        pictures.append(picture.clamp(0, 1))
    return pictures


def read(path: str) -> Tensor:
    """A file as (3, H, W) in [0, 1]."""
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels / 255).permute(2, 0, 1)


def report(pictures: list[Tensor]) -> str:
    """The numbers, as text."""
    real = np.array([float(jpeg_kilobytes(picture[None])) for picture in pictures])
    guess = np.array([float(estimated_kilobytes(picture[None])) for picture in pictures])
    ratio, order = guess / real, np.argsort(real)
    parts = [spearmanr(real[part], guess[part]).statistic for part in np.array_split(order, 4)]
    return (
        f"{len(pictures)} pictures of {real.min():.2f} to {real.max():.2f} kB: rank correlation "
        f"{spearmanr(real, guess).statistic:.4f}, within quarters by size {min(parts):.3f} to {max(parts):.3f}; "
        f"estimate over size {ratio.mean():.3f} +- {ratio.std():.3f}"
    )


if __name__ == "__main__":
    print(report([read(path) for path in sys.argv[1:]] or drawn_pictures()))
