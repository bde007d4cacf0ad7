"""How far the images of one prompt are apart: a reward of a group, given to its images by what each adds.

    d_ij  distance of images i and j in an embedding, in [0, 1]
    d_i   = mean_{j != i} d_ij                                      the score of image i
    D     = mean_i d_i, the mean over the pairs of the group        component `group`
    D(all) - D(all without i) = 2 (d_i - D) / (G - 2)               component `contribution`, for G >= 3
    min_{j != i} d_ij                                               component `nearest`

Scores d_i against any baseline that does not depend on image i give the policy gradient of E[G D / 2]: a pair's
distance is credited to both of its images. The mean score of the others of the group is no such baseline, as their
distances to image i are in it; the trainer takes that of the other groups. A group of one has no diversity: it
scores 0.

    colour     pixels averaged to 8 x 8; root mean square difference
    imagenet   (1 - cosine) / 2 of EfficientNet-Lite0's pooled features (extra `imagenet`)
    file.py:f  (1 - cosine) / 2 of your own function's features, images (B, 3, H, W) -> (B, F)

Legend: `B` batch, `G` images of the group, `F` features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast, final

import torch
from torch import Tensor
from torch.nn import functional

from rewards.base import Metadata, UserError
from rewards.card import Alternative, Card
from rewards.loading import load_named
from rewards.models import imagenet
from rewards.registry import register

GRID = 8

Embedding = Callable[[Tensor], Tensor]


@register(
    "diversity",
    differentiable=True,
    groupwise=True,
    range=(0.0, 1.0),
    card=Card(
        origin="mean pairwise distance, credited by leave-one-out (Wolpert & Tumer 2001, difference rewards)",
        licence="definition",
        typical="0 equal images; colour: 0.1-0.4; imagenet: 0.05 alike, 0.3 different subjects",
        caution="an image is scored against the others of its prompt, which the gradient treats as fixed; a baseline "
        "of the group depends on the image too, which changes the size of the gradient",
        alternatives=(
            Alternative(option="embedding", value="imagenet", modules=imagenet.MODULES, extra=imagenet.EXTRA),
        ),
    ),
)
@final
class Diversity:
    """Mean distance to the other images of the prompt.

    Args:
        device: Where an embedding network runs.
        embedding: `colour`, `imagenet`, or your own as `file.py:name`.

    Raises:
        UserError: There is no such embedding.
        ImportError: `imagenet` needs an extra; the message names it.
    """

    def __init__(self, *, device: torch.device, embedding: str = "colour") -> None:
        self._distances = euclidean if embedding == "colour" else cosine
        self._embed = make_embedding(embedding, device)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> dict[str, Tensor]:
        """Scores `(G,)` of one group, with the group's diversity and each image's contribution to it."""
        size = len(images)
        distances = self._distances(self._embed(images.float()))
        own = distances.sum(dim=1) / max(1, size - 1)
        group = own.mean()
        contribution = 2 * (own - group) / (size - 2) if size > 2 else group.expand(size)
        apart = distances + torch.diag(torch.full((size,), math.inf, device=distances.device))
        nearest = apart.amin(1) if size > 1 else own
        return {"score": own, "group": group.expand(size), "contribution": contribution, "nearest": nearest}


def colours(images: Tensor) -> Tensor:
    """Pixels averaged over an 8 x 8 grid, `(B, 192)` in [0, 1]."""
    return functional.adaptive_avg_pool2d(images, GRID).flatten(1)


def euclidean(features: Tensor) -> Tensor:
    """Root mean square differences of rows `(G, F)`, `(G, G)`."""
    distances = torch.cdist(features[None], features[None], compute_mode="donot_use_mm_for_euclid_dist")[0]
    return distances / math.sqrt(features.shape[1])


def cosine(features: Tensor) -> Tensor:
    """(1 - cosine) / 2 of rows `(G, F)`, `(G, G)` in [0, 1], exactly 0 on the diagonal."""
    unit = functional.normalize(features.float(), dim=1)
    apart = (0.5 * (1 - unit @ unit.T)).clamp(0, 1)
    return apart * (1 - torch.eye(len(features), device=features.device))


def make_embedding(name: str, device: torch.device) -> Embedding:
    """Features (B, F) of images (B, 3, H, W) in [0, 1], by the name of an embedding; errors as of `Diversity`."""
    if name == "colour":
        return colours
    if name == "imagenet":
        return imagenet.ImageNetClassifier(reward="diversity", device=device).features
    if ":" not in name:
        raise UserError(
            f"reward 'diversity': embedding must be colour, imagenet, or your own as file.py:name, got {name!r}"
        )
    return cast(Embedding, load_named(name))
