"""Names the colour of a detected object: CLIP, given the cut-out and the ten colours of GenEval as texts.

    colour = argmax_c cos(CLIP(cut-out), t_c),   t_c the mean of three texts' unit embeddings, brought to unit length

The texts are "a photo of a C OBJECT", "a photo of a C-colored OBJECT" and "a photo of a C object", as in the official
evaluation, which also uses CLIP ViT-L/14. It paints what is not the object grey; without masks the whole box is shown,
so a small object on a coloured ground can be taken for the ground's colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from rewards.builtin.geneval.rules import Box
from rewards.builtin.geneval.spec import COLORS
from rewards.images.preprocessing import Preprocessing
from rewards.models.transformers_model import DualEncoder

TEMPLATES = ("a photo of a {color} {kind}", "a photo of a {color}-colored {kind}", "a photo of a {color} object")


@final
class ColorNamer:
    """A CLIPModel that tells the ten colours apart.

    Args:
        reward: Name of the reward, for messages.
        model: Local folder or `owner/name` of a CLIPModel.
        revision: Its commit on the hub.
        sha256: Expected hash of its `model.safetensors`; empty = not compared.
        device: Where it runs.

    Raises:
        ImportError: The package transformers is not installed.
        UserError: Files are missing, differ, or do not fit.
    """

    def __init__(self, *, reward: str, model: str, revision: str, sha256: str, device: torch.device) -> None:
        self._encoder = DualEncoder(
            reward=reward,
            kind="CLIPModel",
            model=model,
            revision=revision,
            sha256=sha256,
            preprocess=Preprocessing(size=(224, 224), offset="floor"),
            device=device,
        )
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, image: Tensor, boxes: Sequence[Box], kind: str) -> list[str]:
        """The colour of each object of a class in an image `(3, H, W)` in [0, 1]."""
        cut_outs = [self._encoder.embed_images(cut_out(image, box)[None]) for box in boxes]
        if not cut_outs:
            return []
        nearest = (torch.cat(cut_outs) @ self._classifier(kind).T).argmax(dim=1)
        return [COLORS[number] for number in nearest.tolist()]

    def _classifier(self, kind: str) -> Tensor:
        """Unit vectors `(10, D)` of the colours of a class."""
        if kind not in self._known:
            texts = [template.format(color=color, kind=kind) for color in COLORS for template in TEMPLATES]
            embeddings = self._encoder.embed_texts(texts).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self._known[kind] = functional.normalize(embeddings.mean(dim=1), dim=1)
        return self._known[kind]


def cut_out(image: Tensor, box: Box) -> Tensor:
    """The part of an image `(3, H, W)` in a box, rounded to whole pixels, at least one."""
    height, width = image.shape[-2:]
    left, top = min(round(box[0]), width - 1), min(round(box[1]), height - 1)
    return image[:, top : max(round(box[3]), top + 1), left : max(round(box[2]), left + 1)]
