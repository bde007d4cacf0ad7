"""LAION's aesthetic score, the one of DDPO's experiments: a linear head on CLIP ViT-L/14 (Schuhmann 2022).

    score = head(e / |e|),   e the CLIP image embedding, head 768-1024-128-64-16-1 without activations

Trained on ratings from 1 to 10 (SAC, Logos, AVA); the prompt plays no part.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from rewards.base import Metadata
from rewards.card import Card
from rewards.downloads import Download
from rewards.models.linear_head import linear_head
from rewards.models.open_clip_model import OPENAI, OpenClip
from rewards.models.weights import load_tensors, locate_file
from rewards.registry import register

HEAD = Download(
    file="sac+logos+ava1-l14-linearMSE.pth",
    url="https://raw.githubusercontent.com/christophschuhmann/improved-aesthetic-predictor/"
    "6934dd81792f086e613a121dbce43082cb8be85e/sac%2Blogos%2Bava1-l14-linearMSE.pth",
    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
)


@register(
    "aesthetic",
    differentiable=True,
    range=(-float("inf"), float("inf")),
    card=Card(
        origin="github.com/christophschuhmann/improved-aesthetic-predictor on open_clip ViT-L-14 openai",
        licence="Apache-2.0 (head), MIT (CLIP)",
        typical="4-6 photographs and Stable Diffusion, above 6 liked",
        extra="open_clip",
        modules=("open_clip",),
        downloads=(
            OPENAI,
            HEAD,
        ),
    ),
)
@final
class Aesthetic:
    """LAION aesthetic score of the image, about 1 to 10.

    Args:
        device: Where the model runs.
        head: Local file of the head, .pth or .safetensors; downloaded and compared with its known hash when None.
        head_sha256: Expected hash of a local head.
        model: CLIP architecture of open_clip, `local-dir:PATH` or `hf-hub:owner/name`.
        pretrained: Weights tag or local file of an architecture.
        sha256: Expected hash of the CLIP weights file.
        revision: Commit of an `hf-hub:` model.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        head: str | None = None,
        head_sha256: str = "",
        model: str = "ViT-L-14-quickgelu",
        pretrained: str = "openai",
        sha256: str = "",
        revision: str = "main",
    ) -> None:
        self.encoder = OpenClip(
            reward="aesthetic",
            model=model,
            pretrained=pretrained,
            sha256=sha256,
            revision=revision,
            device=device,
        )
        path = locate_file("aesthetic", head, HEAD, option="head", sha256=head_sha256)
        tensors = load_tensors("aesthetic", path)
        self.head = linear_head("aesthetic", tensors, width=self.encoder.width).to(device)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
        """Scores `(B,)`."""
        return self.head(self.encoder.embed_images(images)).squeeze(1)
