"""How well picture and prompt agree for SigLIP (Zhai et al. 2023, arXiv:2303.15343).

    logit = exp(logit_scale) * cos(image embedding, text embedding) + logit_bias

SigLIP is trained as a classifier of single pairs, so sigmoid(logit) is a probability of a match, without other texts to
compare with. The score is the logit: the probability is nearly 0 for most generated pictures and has no slope there.
"""

from __future__ import annotations

from typing import cast, final

import torch
from torch import Tensor

from rewards.base import Metadata
from rewards.card import Card
from rewards.downloads import Download
from rewards.models.siglip import MODEL, REVISION, SIGLIP
from rewards.models.transformers_model import DualEncoder
from rewards.models.weights import pinned
from rewards.registry import register


@register(
    "siglip_score",
    differentiable=True,
    range=(-float("inf"), float("inf")),
    card=Card(
        origin="Zhai et al., arXiv:2303.15343; huggingface.co/google/siglip-so400m-patch14-384",
        licence="Apache-2.0",
        typical="about -15 unrelated, near 0 matching",
        modules=("transformers",),
        downloads=(Download(repository=MODEL, revision=REVISION),),
    ),
)
@final
class SiglipScore:
    """Log-odds of SigLIP that image and prompt belong together.

    Args:
        device: Where the model runs.
        model: Local folder or `owner/name` of a SiglipModel.
        revision: Its commit on the hub; empty = the pinned one of the default model, `main` of another.
        sha256: Expected hash of its `model.safetensors`.
    """

    def __init__(self, *, device: torch.device, model: str = MODEL, revision: str = "", sha256: str = "") -> None:
        self.encoder = DualEncoder(
            reward="siglip_score",
            kind="SiglipModel",
            model=model,
            revision=pinned(model, revision, default=(MODEL, REVISION)),
            sha256=sha256,
            preprocess=SIGLIP,
            device=device,
        )

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> dict[str, Tensor]:
        """Logits `(B,)`, with the probability as a component."""
        logits = self.encoder.scale * self.encoder.cosines(images, prompts) + cast(
            Tensor, self.encoder.network.logit_bias
        )
        return {"score": logits, "probability": logits.sigmoid()}
