"""What a preference model sees of pictures and captions: pixels and words, or frozen embeddings.

    cnn                         pixels at `side` x `side`, words of the training captions; for tiny pictures
    imagenet                    EfficientNet-Lite0's class scores (extra `imagenet`), words of the training captions
    open_clip:MODEL@PRETRAINED  image and text embeddings of any open_clip model (extra `open_clip`), e.g.
                                open_clip:ViT-L-14-quickgelu@openai or open_clip:local-dir:/data/folder
    clip:MODEL, siglip:MODEL    the same of transformers: a folder or `owner/name[@revision]` on the hub

A frozen encoder is run once over all pictures, then only a small head is trained. Legend: `B` batch, `D` dimensions.
"""

from __future__ import annotations

from typing import Protocol, final

import torch
from torch import Tensor
from torch.nn import functional

from rewards.base import UserError
from rewards.images.preprocessing import Preprocessing, resize
from rewards.models.imagenet import ImageNetClassifier
from rewards.models.open_clip_model import OpenClip
from rewards.models.siglip import SIGLIP
from rewards.models.transformers_model import DualEncoder
from rewards.preferences.networks import CaptionedCnn, EmbeddingHead, Scorer
from rewards.preferences.vocabulary import Vocabulary

REWARD = "learned"
CNN_CHANNELS, CNN_WIDTH, HEAD_WIDTH = 48, 64, 128


class Encoder(Protocol):
    """From pictures and captions to what a scorer takes; differentiable in the pictures."""

    def images(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` in [0, 1] to features `(B, ...)`."""

    def captions(self, captions: list[str]) -> Tensor:
        """`B` captions to word indices `(B, L)` int64 or embeddings `(B, D)` float32."""

    def scorer(self) -> Scorer:
        """A new scorer of such features, with random weights."""


def make_encoder(name: str, *, vocabulary: Vocabulary, side: int, device: torch.device) -> Encoder:
    """The encoder of a name, see the module docstring.

    Args:
        name: One of the forms above.
        vocabulary: Words of the captions, for encoders without a text part.
        side: Of the pictures that the CNN sees, pixels.
        device: Where it runs.

    Raises:
        UserError: Unknown name, or weights that are missing.
        ImportError: A package is missing; the message names the extra.
    """
    kind, _, model = name.partition(":")
    if kind == "cnn" and not model:
        return Pixels(vocabulary=vocabulary, side=side, device=device)
    if kind == "imagenet" and not model:
        return ImageNet(vocabulary=vocabulary, device=device)
    model, _, which = model.partition("@")
    if kind == "open_clip" and model:
        return TwoTowers(OpenClip(reward=REWARD, model=model, pretrained=which, device=device))
    if kind in ("clip", "siglip") and model:
        is_clip = kind == "clip"
        towers = DualEncoder(
            reward=REWARD,
            kind="CLIPModel" if is_clip else "SiglipModel",
            model=model,
            revision=which or "main",
            sha256="",
            preprocess=Preprocessing(size=(224, 224), offset="floor") if is_clip else SIGLIP,
            device=device,
        )
        return TwoTowers(towers)
    raise UserError(
        f"encoder must be cnn, imagenet, open_clip:MODEL@PRETRAINED, clip:MODEL or siglip:MODEL, got {name!r}"
    )


@final
class Pixels:
    """Pictures at one small size, captions as words.

    Args:
        vocabulary: Words.
        side: Of the square that pictures are brought to, pixels.
        device: Where tensors go.
    """

    def __init__(self, *, vocabulary: Vocabulary, side: int, device: torch.device) -> None:
        self._vocabulary = vocabulary
        self._side = side
        self._device = device

    def images(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` to `(B, 3, side, side)`, both in [0, 1]."""
        return resize(images.to(self._device, torch.float32), (self._side, self._side))

    def captions(self, captions: list[str]) -> Tensor:
        """Word indices `(B, L)`."""
        return self._vocabulary.encode(captions).to(self._device)

    def scorer(self) -> Scorer:
        """The CNN."""
        words = len(self._vocabulary)
        return CaptionedCnn(side=self._side, channels=CNN_CHANNELS, num_words=words, width=CNN_WIDTH).to(self._device)


@final
class ImageNet:
    """EfficientNet-Lite0's class scores at unit length, captions as words.

    Args:
        vocabulary: Words.
        device: Where the network runs.
    """

    def __init__(self, *, vocabulary: Vocabulary, device: torch.device) -> None:
        self._vocabulary = vocabulary
        self._classifier = ImageNetClassifier(reward=REWARD, device=device)
        self._device = device

    def images(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` to centred class scores at unit length, `(B, 1000)`."""
        scores = self._classifier.log_probabilities(images)
        return functional.normalize(scores - scores.mean(1, keepdim=True), dim=1)

    def captions(self, captions: list[str]) -> Tensor:
        """Word indices `(B, L)`."""
        return self._vocabulary.encode(captions).to(self._device)

    def scorer(self) -> Scorer:
        """A head."""
        head = EmbeddingHead(image_inputs=1000, text_inputs=0, num_words=len(self._vocabulary), width=HEAD_WIDTH)
        return head.to(self._device)


@final
class TwoTowers:
    """Image and text embeddings of one frozen model, at unit length.

    Args:
        model: Of open_clip or transformers.
    """

    def __init__(self, model: OpenClip | DualEncoder) -> None:
        self._model = model

    def images(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` to `(B, D)`."""
        return self._model.embed_images(images)

    def captions(self, captions: list[str]) -> Tensor:
        """`(B, D)`."""
        return self._model.embed_texts(captions)

    def scorer(self) -> Scorer:
        """A head."""
        width = self._model.embed_texts(["a picture"]).shape[1]  # image and text share the space
        head = EmbeddingHead(image_inputs=width, text_inputs=width, num_words=0, width=HEAD_WIDTH)
        return head.to(self._model.device)
