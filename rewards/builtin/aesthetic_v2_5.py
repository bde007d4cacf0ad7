"""Aesthetic Predictor v2.5 (discus0434, 2024): a linear head on SigLIP's image embedding.

    score = head(e / |e|),   e the pooled output of SigLIP's vision tower, head 1152-1024-128-64-16-1

Rates illustrations and photographs from 1 to 10; the prompt plays no part. SigLIP is pinned, the head is not: it
is what the author has on the branch main, of unknown hash.
"""

from __future__ import annotations

from dataclasses import replace
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from rewards.base import Metadata
from rewards.card import Card
from rewards.downloads import Download
from rewards.models.linear_head import linear_head
from rewards.models.siglip import MODEL, REVISION, SIGLIP
from rewards.models.transformers_model import load_network, setting
from rewards.models.weights import load_tensors, locate_file, locate_folder, pinned
from rewards.registry import register

HEAD = Download(
    file="aesthetic_predictor_v2_5.pth",
    url="https://github.com/discus0434/aesthetic-predictor-v2-5/raw/main/models/aesthetic_predictor_v2_5.pth",
)


@register(
    "aesthetic_v2_5",
    differentiable=True,
    range=(-float("inf"), float("inf")),
    card=Card(
        origin="github.com/discus0434/aesthetic-predictor-v2-5 on google/siglip-so400m-patch14-384",
        licence="AGPL-3.0 (head and code), Apache-2.0 (SigLIP)",
        typical="1-10; its author calls 5.5 and above good",
        modules=("transformers",),
        downloads=(
            Download(repository=MODEL, revision=REVISION),
            HEAD,
        ),
    ),
)
@final
class AestheticV25:
    """Aesthetic score of the image on SigLIP, about 1 to 10.

    Args:
        device: Where the model runs.
        head: Local file of the head, .pth or .safetensors; downloaded when None.
        head_sha256: Expected hash of the head, local or downloaded.
        model: Local folder or `owner/name` of a SigLIP model.
        revision: Its commit on the hub; empty = the pinned one of the default model, `main` of another.
        sha256: Expected hash of its `model.safetensors`.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        head: str | None = None,
        head_sha256: str = "",
        model: str = MODEL,
        revision: str = "",
        sha256: str = "",
    ) -> None:
        revision = pinned(model, revision, default=(MODEL, REVISION))
        folder = locate_folder("aesthetic_v2_5", model, revision=revision, option="model", sha256=sha256)
        path = locate_file("aesthetic_v2_5", head, HEAD, option="head", sha256=head_sha256)
        self.network = load_network("aesthetic_v2_5", "SiglipVisionModel", folder, device=device)
        side = setting(self.network, "image_size")
        self.preprocess = replace(SIGLIP, size=(side, side))
        tensors = load_tensors("aesthetic_v2_5", path)
        self.head = linear_head("aesthetic_v2_5", tensors, width=setting(self.network, "hidden_size")).to(device)
        self.device = device

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
        """Scores `(B,)`."""
        pooled = self.network(pixel_values=self.preprocess(images.to(self.device))).pooler_output
        return self.head(functional.normalize(pooled, dim=-1)).squeeze(1)
