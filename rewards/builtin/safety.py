"""The safety checker of Stable Diffusion (Rombach et al. 2022): a CLIP image embedding near concepts that it refuses.

    excess_c = cos(e, concept_c) - threshold_c + 0.01 · [some special concept s has cos(e, special_s) > threshold_s]
    flagged  = some excess_c, rounded to three decimals, is positive
    margin   = -max_c excess_c                           positive = not flagged, by that much in cosine

17 concepts and 3 special ones, which make the others stricter, are stored as embeddings with their thresholds; their
names were never published (Rando et al. 2022, arXiv:2210.04610, recover them). `safety` is what the checker decides,
`safety_margin` how far it is from deciding otherwise, with a gradient to the pixels. Keep one of them held out: an
optimiser that follows the margin ends at pictures that fool this network.

Legend: `B` batch, `C` concepts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from rewards.base import Metadata, UserError
from rewards.card import Card
from rewards.downloads import Download
from rewards.images.preprocessing import Preprocessing
from rewards.models.weights import check_hash, load_tensors, locate_folder, pinned
from rewards.optional import require
from rewards.registry import register

MODEL, REVISION = "CompVis/stable-diffusion-safety-checker", "cb41f3a270d63d454d385fc2e4f571c487c253c5"
FILES = ("config.json", "model.safetensors", "pytorch_model.bin")
SPECIAL_CARE = 0.01
CARD = Card(
    origin="Rombach et al., arXiv:2112.10752; huggingface.co/CompVis/stable-diffusion-safety-checker",
    licence="MIT",
    typical="1 nearly all pictures",
    modules=("transformers",),
    downloads=(Download(repository=MODEL, revision=REVISION),),
)


class Checked(ABC):
    """A reward that asks the safety checker.

    Attributes:
        reward: Its name, for messages.

    Args:
        device: Where the model runs.
        model: Local folder or `owner/name`.
        revision: Its commit on the hub.
        sha256: Expected hash of its weights file.
    """

    reward: ClassVar[str]

    def __init__(self, *, device: torch.device, model: str = MODEL, revision: str = "", sha256: str = "") -> None:
        self.checker = SafetyChecker(reward=self.reward, model=model, revision=revision, sha256=sha256, device=device)

    @abstractmethod
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor | dict[str, Tensor]:
        """Scores `(B,)`."""


@register("safety", range=(0.0, 1.0), card=CARD)
@final
class Safety(Checked):
    """1 unless Stable Diffusion's safety checker flags the image.

    Args:
        device: Where the model runs.
        model: Local folder or `owner/name`: config.json with model.safetensors or pytorch_model.bin.
        revision: Its commit on the hub; empty = the pinned one of the default model, `main` of another.
        sha256: Expected hash of its weights file.
    """

    reward = "safety"

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> dict[str, Tensor]:
        """1 or 0 `(B,)`, with the margin as a component."""
        excess = self.checker.excess(images)
        flagged = ((excess * 1000).round() > 0).any(dim=1)
        return {"score": 1 - flagged.float(), "margin": -excess.amax(dim=1)}


@register(
    "safety_margin",
    differentiable=True,
    range=(-3.0, 3.0),
    card=replace(CARD, typical="positive = not flagged, negative = flagged"),
)
@final
class SafetyMargin(Checked):
    """Cosine by which the image stays clear of the nearest concept of Stable Diffusion's safety checker.

    Args:
        device: Where the model runs.
        model: Local folder or `owner/name`: config.json with model.safetensors or pytorch_model.bin.
        revision: Its commit on the hub; empty = the pinned one of the default model, `main` of another.
        sha256: Expected hash of its weights file.
    """

    reward = "safety_margin"

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
        """Margins `(B,)`."""
        return -self.checker.excess(images).amax(dim=1)


@final
class SafetyChecker:
    """The published checker: a CLIP vision model, its projection, and concepts with thresholds.

    Args:
        reward: Name of the reward, for messages.
        model: Local folder or `owner/name`.
        revision: Its commit on the hub.
        sha256: Expected hash of its weights file; empty = not compared.
        device: Where it runs.

    Raises:
        ImportError: The package transformers is not installed.
        UserError: Files are missing, differ, or are not a safety checker's.
    """

    def __init__(self, *, reward: str, model: str, revision: str, sha256: str, device: torch.device) -> None:
        transformers = require("transformers", extra="", reward=reward)
        revision = pinned(model, revision, default=(MODEL, REVISION))
        folder = locate_folder(reward, model, revision=revision, option="model", files=FILES)
        weights = _weights_file(reward, folder)
        check_hash(reward, weights, sha256)
        config = transformers.CLIPConfig.from_pretrained(folder, local_files_only=True)
        config.vision_config.projection_dim = config.projection_dim
        tensors = load_tensors(reward, weights)
        self.concepts, self.thresholds, self.special, self.special_thresholds = (
            _take(reward, tensors, name).float().to(device)
            for name in (
                "concept_embeds",
                "concept_embeds_weights",
                "special_care_embeds",
                "special_care_embeds_weights",
            )
        )
        self.network: nn.Module = transformers.CLIPVisionModelWithProjection(config.vision_config)
        _fill(reward, self.network, tensors, weights)
        self.network.eval().requires_grad_(False).to(device)
        side = config.vision_config.image_size
        self.preprocess = Preprocessing(size=(side, side), offset="floor")
        self.device = device

    def excess(self, images: Tensor) -> Tensor:
        """Cosine above each concept's threshold `(B, C)`; differentiable but for the step of 0.01."""
        embeddings = self.network(pixel_values=self.preprocess(images.to(self.device))).image_embeds
        special = cosines(embeddings, self.special) - self.special_thresholds
        needs_care = ((special * 1000).round() > 0).any(dim=1, keepdim=True)
        return cosines(embeddings, self.concepts) - self.thresholds + SPECIAL_CARE * needs_care


def cosines(embeddings: Tensor, concepts: Tensor) -> Tensor:
    """Of vectors `(B, D)` with vectors `(C, D)`: `(B, C)`."""
    return functional.normalize(embeddings, dim=1) @ functional.normalize(concepts, dim=1).T


def _weights_file(reward: str, folder: Path) -> Path:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file() and (folder / "config.json").is_file():
            return folder / name
    raise UserError(
        f"reward {reward!r}: {folder} must hold config.json and model.safetensors or pytorch_model.bin; "
        f"fetch them with `hf download {MODEL} --revision {REVISION} --local-dir DIR` and set the option model: DIR"
    )


def _take(reward: str, tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise UserError(f"reward {reward!r}: the weights have no {name}; they are not a safety checker's")
    return tensors.pop(name)


def _fill(reward: str, network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Loads the vision model and projection; the checker keeps the former one level deeper."""
    own = set(network.state_dict())
    inner = {name.removeprefix("vision_model.") if name not in own else name: t for name, t in tensors.items()}
    inner.pop("vision_model.embeddings.position_ids", None)  # counts from 0, stored by older versions
    try:
        network.load_state_dict(inner)
    except RuntimeError as error:
        raise UserError(f"reward {reward!r}: {path} does not fit its config.json: {error}") from error
