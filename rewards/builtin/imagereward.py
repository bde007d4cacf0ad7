"""ImageReward (Xu et al. 2023, arXiv:2304.05977): BLIP, fine-tuned on rankings by experts, reads picture and prompt.

    score = (head(c) - m) / s,   c the first token of the text encoder, which attends to all patches of the picture

m and s are the mean and standard deviation of the raw score on the authors' validation prompts. The published file
follows the original BLIP code; here its tensors get transformers' names and go into BlipVisionModel (ViT-L/16) and
BlipTextModel (BERT-base with cross-attention, not causal). Both are the same functions; ViT's layer norms have
epsilon 1e-6 there and 1e-5 is transformers' default, so it is set.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast, final

import torch
from torch import Tensor

from rewards.base import Metadata, UserError
from rewards.card import Card
from rewards.downloads import Download
from rewards.images.preprocessing import Preprocessing
from rewards.models.linear_head import linear_head
from rewards.models.transformers_model import Tokenizer
from rewards.models.weights import (
    TOKENIZER_FILES,
    load_tensors,
    local_file,
    locate_file,
    locate_folder,
    pinned,
)
from rewards.optional import require
from rewards.registry import register

MEAN, STD = 0.16717362830052426, 1.0333394966054072
TOKENS = 35
_REPOSITORY, _REVISION = "zai-org/ImageReward", "5736be03b2652728fb87788c9797b0570450ab72"
WEIGHTS = Download(file="ImageReward.pt", repository=_REPOSITORY, revision=_REVISION)
TOKENIZER, TOKENIZER_REVISION = "google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594"

VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
}
TEXT = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
}
_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


@register(
    "imagereward",
    differentiable=True,
    range=(-float("inf"), float("inf")),
    card=Card(
        origin="Xu et al., arXiv:2304.05977; huggingface.co/zai-org/ImageReward",
        licence="Apache-2.0",
        typical="-2 to 2, Stable Diffusion 1.5 about 0.2",
        modules=("transformers",),
        downloads=(
            WEIGHTS,
            Download(file="tokenizer", repository=TOKENIZER, revision=TOKENIZER_REVISION),
        ),
    ),
)
@final
class ImageReward:
    """Expert preference for the image given the prompt, in standard deviations.

    Args:
        device: Where the model runs.
        path: Local file of the weights, ImageReward.pt or its tensors as .safetensors; downloaded when None.
        sha256: Expected hash of the weights, local or downloaded.
        tokenizer: Local folder or `owner/name` of BERT's uncased tokenizer.
        tokenizer_revision: Its commit on the hub; empty = the pinned one of the default, `main` of another.
        config: JSON file `{"vision": {...}, "text": {...}}` of other sizes than the published model's.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        path: str | None = None,
        sha256: str = "",
        tokenizer: str = TOKENIZER,
        tokenizer_revision: str = "",
        config: str | None = None,
    ) -> None:
        transformers = require("transformers", extra="", reward="imagereward")
        words = locate_folder(
            "imagereward",
            tokenizer,
            revision=pinned(tokenizer, tokenizer_revision, default=(TOKENIZER, TOKENIZER_REVISION)),
            option="tokenizer",
            files=TOKENIZER_FILES,
        )
        weights = locate_file("imagereward", path, WEIGHTS, option="path", sha256=sha256)
        tensors = load_tensors("imagereward", weights)
        vision, text = _configs(config)
        with torch.device("meta"):
            self.vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(**vision, layer_norm_eps=1e-6))
            self.text = transformers.BlipTextModel(
                transformers.BlipTextConfig(**text, encoder_hidden_size=vision["hidden_size"], is_decoder=True),
                add_pooling_layer=False,
            )
        _load(self.vision, rename_vision(_below(tensors, "blip.visual_encoder.")))
        _load(self.text, _below(tensors, "blip.text_encoder."))
        for network in (self.vision, self.text):
            network.eval().requires_grad_(False).to(device)
        self.head = linear_head("imagereward", _below(tensors, "mlp."), width=text["hidden_size"]).to(device)
        self.preprocess = Preprocessing(size=(vision["image_size"], vision["image_size"]))
        self.tokenize = Tokenizer(reward="imagereward", folder=words, length=TOKENS, device=device)
        self.device = device

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
        """Scores `(B,)`."""
        patches = self.vision(pixel_values=self.preprocess(images.to(self.device))).last_hidden_state
        ids, mask = self.tokenize(prompts)
        hidden = self.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=self.device),
            is_decoder=False,
        ).last_hidden_state
        return (self.head(hidden[:, 0]).squeeze(1) - MEAN) / STD


def rename_vision(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BLIP's original names of a vision transformer's tensors to those of BlipVisionModel."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _VISION_NAMES:
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        renamed[name] = tensor
    return renamed


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if not found:
        raise UserError(f"reward 'imagereward': the weights have no tensors {prefix}*, so they are not ImageReward's")
    return found


def _load(network: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    network.to_empty(device="cpu")
    buffers = {name for name, _ in network.named_buffers()}
    wanted = {name: value.float() for name, value in tensors.items() if name not in buffers}
    missing, unexpected = network.load_state_dict(wanted, strict=False)
    missing = [name for name in missing if name not in buffers]
    if missing or unexpected:
        raise UserError(
            f"reward 'imagereward': the weights do not fit {type(network).__name__}: "
            f"missing {', '.join(missing[:3]) or 'none'}; unexpected {', '.join(unexpected[:3]) or 'none'}"
        )
    with torch.no_grad():
        for name, buffer in network.named_buffers():  # empty after to_empty; BERT's position numbers are the only one
            assert name.endswith("position_ids"), name
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))


def _configs(path: str | None) -> tuple[dict[str, int], dict[str, int]]:
    if path is None:
        return VISION, TEXT
    loaded = json.loads(Path(local_file("imagereward", path, option="config")).read_text(encoding="utf-8"))
    if not (isinstance(loaded, dict) and set(loaded) == {"vision", "text"}):
        raise UserError(f"reward 'imagereward': option config: {path} must hold the keys vision and text")
    return VISION | cast(dict[str, int], loaded["vision"]), TEXT | cast(dict[str, int], loaded["text"])
