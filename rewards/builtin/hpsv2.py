"""Human Preference Score v2 (Wu et al. 2023, arXiv:2306.09341): CLIP ViT-H/14 fine-tuned on pairwise choices.

    score = cos(image embedding, text embedding)

Pictures are resized by their longest side and padded with black, unlike other CLIP models. The published tables show
100 x this value.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from rewards.base import Metadata, UserError
from rewards.card import Card
from rewards.downloads import Download
from rewards.models.open_clip_model import OpenClip
from rewards.models.weights import locate_file
from rewards.registry import register

Version = Literal["v2.0", "v2.1"]

_REPOSITORY, _REVISION = "xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a"
WEIGHTS = {
    "v2.0": Download(file="HPS_v2_compressed.pt", repository=_REPOSITORY, revision=_REVISION),
    "v2.1": Download(
        file="HPS_v2.1_compressed.pt",
        repository=_REPOSITORY,
        revision=_REVISION,
        sha256="c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
    ),
}


@register(
    "hpsv2",
    differentiable=True,
    range=(-1.0, 1.0),
    card=Card(
        origin="Wu et al., arXiv:2306.09341; huggingface.co/xswu/HPSv2",
        licence="Apache-2.0",
        typical="0.2-0.35",
        extra="open_clip",
        modules=("open_clip",),
        downloads=(*WEIGHTS.values(),),
    ),
)
@final
class HumanPreferenceV2:
    """Human preference for the image given the prompt, v2.0 or v2.1.

    Args:
        device: Where the model runs.
        version: Which published weights.
        path: Local file of the weights instead.
        sha256: Expected hash of a local file.
        model: Architecture of open_clip.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        version: Version = "v2.1",
        path: str | None = None,
        sha256: str = "",
        model: str = "ViT-H-14",
    ) -> None:
        if version not in WEIGHTS:
            raise UserError(f"reward 'hpsv2': version must be one of {', '.join(WEIGHTS)}, got {version!r}")
        weights = locate_file("hpsv2", path, WEIGHTS[version], option="path", sha256=sha256)
        self.encoder = OpenClip(reward="hpsv2", model=model, pretrained=str(weights), device=device, fit="longest")

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
        """Cosines `(B,)`."""
        return self.encoder.cosines(images, prompts)
