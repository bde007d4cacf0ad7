"""What pictures and captions look like to an encoder, computed once for all pairs.

Legend: `N` pictures, `P` captions, `M` pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from rewards.images.picture import load_image
from rewards.preferences.encoders import Encoder
from rewards.preferences.pairs import Pair
from rewards.preferences.progress import track

_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class PairFeatures:
    """Pairs as indices into pictures and captions.

    Attributes:
        images: (N, ...) float32.
        captions: (P, ...) int64 or float32.
        a: (M,) index of the first picture.
        b: (M,) index of the second picture.
        caption: (M,) index of the caption.
        label: (M,) float32 in {0, 0.5, 1}; NaN without a label.
        group: (M,) number of the comparison that a pair belongs to: pairs of one prompt that share pictures, directly
            or through other pairs, have the same.
    """

    images: Tensor
    captions: Tensor
    a: Tensor
    b: Tensor
    caption: Tensor
    label: Tensor
    group: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def subset(self, rows: Tensor) -> PairFeatures:
        """The given pairs, (m,) int64, repeats allowed, of the same pictures and captions."""
        return PairFeatures(
            images=self.images,
            captions=self.captions,
            a=self.a[rows],
            b=self.b[rows],
            caption=self.caption[rows],
            label=self.label[rows],
            group=self.group[rows],
        )

    @property
    def keys(self) -> Tensor:
        """A number for each distinct picture of a caption, of all first and then all second pictures: (2 M,)."""
        count = len(self.captions)
        return torch.cat([self.a * count + self.caption, self.b * count + self.caption])


@torch.no_grad()
def encode(pairs: Sequence[Pair], encoder: Encoder, *, show: bool = False) -> PairFeatures:
    """Encodes every picture and caption once.

    Args:
        pairs: What is needed.
        encoder: Makes the features.
        show: Whether to show a bar.

    Raises:
        UserError: A picture cannot be read.
    """
    files = sorted({path for pair in pairs for path in (pair.a, pair.b)})
    texts = sorted({pair.prompt for pair in pairs})
    place = {path: number for number, path in enumerate(files)}
    row = {text: number for number, text in enumerate(texts)}
    parts = []
    starts = range(0, len(files), _BATCH)
    for start in track(starts, "reading pictures", show=show):
        parts += _encode_files(files[start : start + _BATCH], encoder)
    a = torch.tensor([place[pair.a] for pair in pairs])
    b = torch.tensor([place[pair.b] for pair in pairs])
    caption = torch.tensor([row[pair.prompt] for pair in pairs])
    captions = [encoder.captions(texts[start : start + _BATCH]) for start in range(0, len(texts), _BATCH)]
    return PairFeatures(
        images=torch.cat(parts),
        captions=torch.cat(captions),
        a=a,
        b=b,
        caption=caption,
        label=torch.tensor([float("nan") if pair.label is None else pair.label for pair in pairs]),
        group=_groups(a * len(texts) + caption, b * len(texts) + caption),
    )


def _groups(first: Tensor, second: Tensor) -> Tensor:
    """Connected components of the graph whose nodes are pictures of a caption and whose edges are pairs, by edge."""
    nodes, places = torch.unique(torch.cat([first, second]), return_inverse=True)
    left, right = places.chunk(2)
    edges = coo_array((np.ones(len(left)), (left.numpy(), right.numpy())), shape=(len(nodes), len(nodes)))
    _, component = connected_components(edges, directed=False)
    return torch.from_numpy(component).long()[left]


def _encode_files(files: Sequence[Path], encoder: Encoder) -> list[Tensor]:
    pictures = [load_image(path) for path in files]
    if len({picture.shape for picture in pictures}) == 1:
        return [encoder.images(torch.cat(pictures))]
    return [encoder.images(picture) for picture in pictures]
