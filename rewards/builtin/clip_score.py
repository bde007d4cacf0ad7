"""How well picture and prompt agree for a CLIP model (Hessel et al. 2021, without the factor 2.5 and the cut at 0).

score = cos(image embedding, text embedding)
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from rewards.base import Metadata
from rewards.card import Card
from rewards.models.open_clip_model import OPENAI, OpenClip
from rewards.registry import register


@register(
    "clip_score",
    differentiable=True,
    range=(-1.0, 1.0),
    card=Card(
        origin="Radford et al., arXiv:2103.00020; Hessel et al., arXiv:2104.08718; weights by open_clip",
        licence="MIT (openai weights); other tags: see their model cards",
        typical="0.15 unrelated, 0.25-0.35 matching (ViT-L-14 openai)",
        extra="open_clip",
        modules=("open_clip",),
        downloads=(OPENAI,),
    ),
)
@final
class ClipScore:
    """Cosine of image and prompt under any open_clip model.

    Args:
        device: Where the model runs.
        model: Architecture of open_clip, `local-dir:PATH` or `hf-hub:owner/name`.
        pretrained: Weights tag or local file of an architecture.
        sha256: Expected hash of the weights file.
        revision: Commit of an `hf-hub:` model.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        model: str = "ViT-L-14-quickgelu",
        pretrained: str = "openai",
        sha256: str = "",
        revision: str = "main",
    ) -> None:
        self.encoder = OpenClip(
            reward="clip_score",
            model=model,
            pretrained=pretrained,
            sha256=sha256,
            revision=revision,
            device=device,
        )

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
        """Cosines `(B,)`."""
        return self.encoder.cosines(images, prompts)
