"""The networks that score a picture for a prompt: a head on frozen embeddings, or a small CNN for tiny pictures.

    CNN    stride-2 convolutions to 8 x 8, then two residual blocks whose channels the caption scales and shifts
           (FiLM, Perez et al. 2018, arXiv:1709.07871), mean and maximum over places, a hidden layer, one number
    head   [image, caption, image * caption] to a hidden layer to one number

A caption is either a vector from a frozen text encoder or a row of word indices that a GRU reads. A score is
`score(images, read(captions))`, so that two pictures of one prompt read it once.

Legend: `B` batch, `L` words, `W` width of the caption's vector, `S` side of the picture in pixels.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

COARSE = 8
_GROUPS = 8


@final
class CaptionReader(nn.Module):
    """Reads a caption into a vector.

    Args:
        num_words: Size of the vocabulary, 0 for padding, where captions are word indices; 0 where they are vectors.
        inputs: Dimensions of a caption's vector where it comes from a frozen encoder.
        width: `W`.
    """

    def __init__(self, *, num_words: int, inputs: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(num_words, width, padding_idx=0) if num_words else None
        self.order = nn.GRU(width, width, batch_first=True) if num_words else None
        self.project = None if num_words else nn.Linear(inputs, width)

    def forward(self, captions: Tensor) -> Tensor:
        """`(B, L)` int64 or `(B, inputs)` float32 to `(B, W)`."""
        if self.words is None or self.order is None:
            assert self.project is not None
            return self.project(captions)
        states, _ = self.order(self.words(captions))
        last = (captions != 0).sum(1).sub(1).clamp(min=0)
        return states[torch.arange(len(captions), device=captions.device), last]


@final
class _CaptionedBlock(nn.Module):
    """x + relu(scale * norm(conv(x)) + shift), scale and shift linear in the caption."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(_GROUPS, channels, affine=False)
        self.film = nn.Linear(width, 2 * channels)

    def forward(self, x: Tensor, caption: Tensor) -> Tensor:
        scale, shift = self.film(caption)[:, :, None, None].chunk(2, dim=1)
        return x + functional.relu((1 + scale) * self.norm(self.conv(x)) + shift)


@final
class CaptionedCnn(nn.Module):
    """A CNN for tiny pictures whose features depend on the caption.

    Args:
        side: `S`, 8 times a power of two.
        channels: Of the coarse features.
        num_words: Size of the vocabulary.
        width: `W`.

    Raises:
        ValueError: `side` is not 8 times a power of two.
    """

    def __init__(self, *, side: int, channels: int, num_words: int, width: int) -> None:
        super().__init__()
        halvings = (side // COARSE).bit_length() - 1
        if halvings < 1 or side != COARSE << halvings:
            raise ValueError(f"side must be 16, 32, 64 or 128 pixels, got {side}")
        self.reader = CaptionReader(num_words=num_words, inputs=0, width=width)
        stem: list[nn.Module] = []
        inputs = 3
        for step in range(halvings):
            outputs = max(_GROUPS, channels >> (halvings - 1 - step))
            stem += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.GroupNorm(_GROUPS, outputs), nn.ReLU()]
            inputs = outputs
        self.stem = nn.Sequential(*stem)
        self.mix = nn.Conv2d(channels + 2, channels, 1)
        self.blocks = nn.ModuleList([_CaptionedBlock(channels, width) for _ in range(2)])
        self.head = nn.Sequential(nn.Linear(2 * channels + width, 2 * channels), nn.ReLU(), nn.Linear(2 * channels, 1))

    def read(self, captions: Tensor) -> Tensor:
        """Word indices `(B, L)` to `(B, W)`."""
        return self.reader(captions)

    def score(self, images: Tensor, caption: Tensor) -> Tensor:
        """Pictures `(B, 3, S, S)` in [0, 1] and captions `(B, W)` to `(B,)`."""
        x = self.stem(2 * images - 1)
        x = functional.relu(self.mix(torch.cat([x, _places(x)], dim=1)))
        for block in self.blocks:
            x = block(x, caption)
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3)), caption], dim=1)).squeeze(1)


@final
class EmbeddingHead(nn.Module):
    """A small network on frozen embeddings.

    Args:
        image_inputs: Dimensions of an image embedding.
        text_inputs: Dimensions of a text embedding; 0 where captions are word indices.
        num_words: Size of the vocabulary, 0 where captions are embeddings.
        width: `W`, also of the hidden layer.
    """

    def __init__(self, *, image_inputs: int, text_inputs: int, num_words: int, width: int) -> None:
        super().__init__()
        self.reader = CaptionReader(num_words=num_words, inputs=text_inputs, width=width)
        self.project = nn.Linear(image_inputs, width)
        self.head = nn.Sequential(nn.Linear(3 * width, width), nn.ReLU(), nn.Linear(width, 1))

    def read(self, captions: Tensor) -> Tensor:
        """Word indices or embeddings to `(B, W)`."""
        return self.reader(captions)

    def score(self, images: Tensor, caption: Tensor) -> Tensor:
        """Image embeddings `(B, image_inputs)` and captions `(B, W)` to `(B,)`."""
        image = self.project(images)
        return self.head(torch.cat([image, caption, image * caption], dim=1)).squeeze(1)


Scorer = CaptionedCnn | EmbeddingHead


def _places(x: Tensor) -> Tensor:
    """Two channels with each place's row and column in [-1, 1]."""
    steps = torch.linspace(-1, 1, x.shape[-1], device=x.device, dtype=x.dtype)
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="ij"))
    return grid.expand(len(x), -1, -1, -1)
