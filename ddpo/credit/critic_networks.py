"""Small networks from a state of a chain, and an embedding of its step and prompt, to features of one width.

The embedding acts on every block: h <- h + f((1 + scale) norm(h) + shift), scale and shift linear in it (FiLM, Perez et
al., arXiv:1709.07871). A state is, by its number of axes,

    (d,)            a vector                        perceptron
    (L, C)          tokens                          attention over tokens with sinusoidal positions, mean over tokens
    (C, H, W)       an image                        convolutions, coordinates among the channels, down to 4 x 4, mean
    (C, F, H, W)    a video                         the same of every frame, mean over frames

N states, W width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

LARGEST_SIDE = 32  # larger images are cut into patches first
SMALLEST_SIDE = 4
NUM_HEADS = 4


class Modulation(nn.Module):
    """Features (N, W, ...) scaled and shifted by a linear function of the embedding (N, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of = nn.Linear(width, 2 * width)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Modulated features."""
        scale, shift = self.of(embedding).reshape(*embedding.shape[:1], -1, *[1] * (h.ndim - 2)).chunk(2, dim=1)
        return (1 + scale) * h + shift


class VectorBody(nn.Module):
    """Of states (N, d)."""

    def __init__(self, dims: int, width: int, *, num_blocks: int = 2) -> None:
        """Makes a perceptron of residual blocks."""
        super().__init__()
        self.enter = nn.Linear(dims, width)
        self.modulations = nn.ModuleList(Modulation(width) for _ in range(num_blocks))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(num_blocks)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Features, (N, W)."""
        h = self.enter(x)
        for modulation, block in zip(self.modulations, self.blocks, strict=True):
            h = h + block(modulation(h, embedding))
        return h


class ImageBody(nn.Module):
    """Of states (N, C, H, W), or (N, C, F, H, W) frame by frame."""

    def __init__(self, channels: int, height: int, width_of_image: int, width: int) -> None:
        """Makes a level for every halving; images above `LARGEST_SIDE` are cut into patches at the entrance."""
        super().__init__()
        side, patch = max(height, width_of_image), 1
        while side > LARGEST_SIDE * patch and min(height, width_of_image) >= 2 * patch:
            patch *= 2
        halvings = 0
        while min(height, width_of_image) // patch > SMALLEST_SIDE << halvings:
            halvings += 1
        size, padding = (patch, 0) if patch > 1 else (3, 1)
        self.enter = nn.Conv2d(channels + 2, width, size, stride=patch, padding=padding)
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(halvings + 1))
        self.modulations = nn.ModuleList(Modulation(width) for _ in range(halvings + 1))
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(halvings + 1))
        self.halve = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(halvings))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Features, (N, W)."""
        if x.ndim == 5:
            frames = x.shape[2]
            each = self(x.transpose(1, 2).flatten(0, 1), embedding.repeat_interleave(frames, dim=0))
            return each.unflatten(0, (-1, frames)).mean(1)
        h = self.enter(torch.cat([x, _coordinates(x)], dim=1))
        for level, (norm, modulation, block) in enumerate(zip(self.norms, self.modulations, self.blocks, strict=True)):
            if level > 0:
                h = self.halve[level - 1](h)
            h = h + block(functional.silu(modulation(norm(h), embedding)))
        return h.mean((2, 3))


class TokenBody(nn.Module):
    """Of states (N, L, C)."""

    def __init__(self, channels: int, width: int, *, num_blocks: int = 2) -> None:
        """Makes blocks of attention and a perceptron."""
        super().__init__()
        self.enter = nn.Linear(channels, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2 * num_blocks))
        self.modulations = nn.ModuleList(Modulation(width) for _ in range(2 * num_blocks))
        self.attention = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(num_blocks))
        self.mix = nn.ModuleList(nn.Linear(width, width) for _ in range(num_blocks))
        self.perceptrons = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(num_blocks)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Features, (N, W)."""
        h = self.enter(x)
        h = h + _positions(h)
        for block, (attention, mix, perceptron) in enumerate(
            zip(self.attention, self.mix, self.perceptrons, strict=True)
        ):
            h = h + mix(_attended(attention(self._normed(2 * block, h, embedding))))
            h = h + perceptron(self._normed(2 * block + 1, h, embedding))
        return h.mean(1)

    def _normed(self, place: int, h: Tensor, embedding: Tensor) -> Tensor:
        return self.modulations[place](self.norms[place](h).transpose(1, 2), embedding).transpose(1, 2)


def make_body(shape: Sequence[int], width: int) -> nn.Module:
    """The network for states of a shape, without the batch.

    Raises:
        ValueError: No state has so many axes.
    """
    if len(shape) == 1:
        return VectorBody(shape[0], width)
    if len(shape) == 2:
        return TokenBody(shape[1], width)
    if len(shape) in (3, 4):
        return ImageBody(shape[0], shape[-2], shape[-1], width)
    raise ValueError(f"a critic takes states of one to four axes, got the shape {tuple(shape)}")


def _coordinates(x: Tensor) -> Tensor:
    """Rows and columns of images (N, C, H, W) in [-1, 1], (N, 2, H, W)."""
    rows, columns = (torch.linspace(-1, 1, size, device=x.device, dtype=x.dtype) for size in x.shape[2:])
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(x.shape[0], -1, -1, -1)


def _positions(h: Tensor) -> Tensor:
    """Sines and cosines of the place of every token, (L, W) (Vaswani et al., arXiv:1706.03762)."""
    place = torch.arange(h.shape[1], device=h.device, dtype=h.dtype)[:, None]
    half = h.shape[2] // 2
    rates = torch.exp(-math.log(10_000.0) * torch.arange(half, device=h.device, dtype=h.dtype) / half)
    return torch.cat([(place * rates).sin(), (place * rates).cos()], dim=1)


def _attended(qkv: Tensor) -> Tensor:
    """Self-attention of queries, keys and values (N, L, 3 W), (N, L, W)."""
    q, k, v = qkv.unflatten(2, (3, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
