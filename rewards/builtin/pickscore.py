"""PickScore (Kirstain et al. 2023, arXiv:2305.01569): CLIP ViT-H/14 fine-tuned on choices of users.

    score = exp(logit_scale) * cos(image embedding, text embedding)

Flow-GRPO divides it by 26: give the term the weight 1/26 for its unit.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from rewards.base import Metadata
from rewards.card import Card
from rewards.downloads import Download
from rewards.images.preprocessing import Preprocessing
from rewards.models.transformers_model import DualEncoder
from rewards.models.weights import pinned
from rewards.registry import register

MODEL, REVISION = "yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800"
TOKENIZER, TOKENIZER_REVISION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c"


@register(
    "pickscore",
    differentiable=True,
    range=(-100.0, 100.0),
    card=Card(
        origin="Kirstain et al., arXiv:2305.01569; huggingface.co/yuvalkirstain/PickScore_v1",
        licence="MIT (code); weights: not stated",
        typical="18-24",
        modules=("transformers",),
        downloads=(
            Download(repository=MODEL, revision=REVISION),
            Download(file="tokenizer", repository=TOKENIZER, revision=TOKENIZER_REVISION),
        ),
    ),
)
@final
class PickScore:
    """User preference for the image given the prompt.

    Args:
        device: Where the model runs.
        model: Local folder or `owner/name` of a CLIPModel.
        revision: Its commit on the hub; empty = the pinned one of the default model, `main` of another.
        sha256: Expected hash of its `model.safetensors`.
        tokenizer: Local folder or `owner/name`; empty = the model's own.
        tokenizer_revision: Likewise for the tokenizer.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        model: str = MODEL,
        revision: str = "",
        sha256: str = "",
        tokenizer: str = TOKENIZER,
        tokenizer_revision: str = "",
    ) -> None:
        self.encoder = DualEncoder(
            reward="pickscore",
            kind="CLIPModel",
            model=model,
            revision=pinned(model, revision, default=(MODEL, REVISION)),
            sha256=sha256,
            tokenizer=tokenizer,
            tokenizer_revision=pinned(tokenizer, tokenizer_revision, default=(TOKENIZER, TOKENIZER_REVISION)),
            preprocess=Preprocessing(size=(224, 224), offset="floor"),
            device=device,
        )

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
        """Scores `(B,)`."""
        return self.encoder.scale * self.encoder.cosines(images, prompts)
