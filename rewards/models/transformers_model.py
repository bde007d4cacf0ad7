"""Frozen models and tokenizers of transformers, from a local folder or a pinned revision on the hub.

Only safetensors and JSON are read. Embeddings are `.pooler_output` of `get_image_features` and `get_text_features`,
brought to unit length.
"""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Protocol, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from rewards.base import UserError
from rewards.images.preprocessing import Preprocessing
from rewards.models.weights import TOKENIZER_FILES, locate_folder
from rewards.optional import require


class _Output(Protocol):
    pooler_output: Tensor


class _Embed(Protocol):
    def __call__(self, **inputs: Tensor) -> _Output: ...


def load_network(reward: str, kind: str, folder: Path, *, device: torch.device) -> nn.Module:
    """A model class of transformers with the weights in a folder: float32, evaluation mode, frozen.

    Args:
        reward: Name of the reward, for messages.
        kind: Name of the class, e.g. `CLIPModel`.
        folder: `config.json` and `model.safetensors`.
        device: Where to put it.

    Raises:
        ImportError: The package transformers is not installed.
        UserError: The folder does not hold such a model, or not all of its weights.
    """
    transformers = require("transformers", extra="", reward=reward)
    try:
        network, report = getattr(transformers, kind).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:
        raise UserError(
            f"reward {reward!r}: {folder} cannot be loaded as {kind}: {type(error).__name__}: {error}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"reward {reward!r}: {folder} lacks {len(missing)} weights of {kind}, first {missing[0]}")
    return network.eval().requires_grad_(False).to(device)


def setting(network: nn.Module, path: str) -> int:
    """A number of a model's configuration, by its dotted name."""
    value = attrgetter(f"config.{path}")(network)
    assert isinstance(value, int), path
    return value


@final
class Tokenizer:
    """The tokenizer in a folder, always padding to one length.

    Args:
        reward: Name of the reward, for messages.
        folder: Tokenizer files.
        length: Tokens per text; longer texts are cut.
        device: Where the tokens go.

    Raises:
        ImportError: The package transformers is not installed.
        UserError: The folder holds no tokenizer.
    """

    def __init__(self, *, reward: str, folder: Path, length: int, device: torch.device) -> None:
        transformers = require("transformers", extra="", reward=reward)
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise UserError(
                f"reward {reward!r}: {folder} holds no tokenizer that can be loaded: {type(error).__name__}: {error}"
            ) from error
        self._length = length
        self._device = device

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, both `(B, length)`."""
        encoded = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
        )
        ids = encoded["input_ids"]
        mask = encoded["attention_mask"] if "attention_mask" in encoded else torch.ones_like(ids)
        return ids.to(self._device), mask.to(self._device)


@final
class DualEncoder:
    """Image and text embeddings of a CLIPModel or SiglipModel.

    Args:
        reward: Name of the reward, for messages.
        kind: `CLIPModel` or `SiglipModel`.
        model: Local folder or `owner/name`.
        revision: Commit on the hub.
        sha256: Expected hash of `model.safetensors`; empty = not compared.
        tokenizer: Folder or `owner/name` of the tokenizer, empty when it is the model's own.
        tokenizer_revision: Its commit.
        preprocess: How pictures become inputs; the size is taken from the model.
        device: Where it runs.

    Raises:
        ImportError: The package transformers is not installed.
        UserError: Files are missing, differ, or do not fit.
    """

    def __init__(
        self,
        *,
        reward: str,
        kind: str,
        model: str,
        revision: str,
        sha256: str,
        tokenizer: str = "",
        tokenizer_revision: str = "main",
        preprocess: Preprocessing,
        device: torch.device,
    ) -> None:
        folder = locate_folder(reward, model, revision=revision, option="model", sha256=sha256)
        words = folder
        if tokenizer:
            words = locate_folder(
                reward, tokenizer, revision=tokenizer_revision, option="tokenizer", files=TOKENIZER_FILES
            )
        self.network = load_network(reward, kind, folder, device=device)
        side = setting(self.network, "vision_config.image_size")
        self.preprocess = replace(preprocess, size=(side, side))
        self._tokenize = Tokenizer(
            reward=reward,
            folder=words,
            length=setting(self.network, "text_config.max_position_embeddings"),
            device=device,
        )
        self._masks_padding = kind == "CLIPModel"  # SigLIP was trained attending to the padding
        self.device = device

    def embed_images(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [0, 1] to unit vectors `(B, D)`; differentiable."""
        embed = cast(_Embed, self.network.get_image_features)
        return functional.normalize(embed(pixel_values=self.preprocess(images.to(self.device))).pooler_output, dim=-1)

    @property
    def scale(self) -> Tensor:
        """The learnt factor of cosines, exp(logit_scale)."""
        return cast(Tensor, self.network.logit_scale).exp()

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Texts to unit vectors `(B, D)`, truncated to the model's context."""
        ids, mask = self._tokenize(texts)
        masks = {"attention_mask": mask} if self._masks_padding else {}
        embed = cast(_Embed, self.network.get_text_features)
        return functional.normalize(embed(input_ids=ids, **masks).pooler_output, dim=-1)

    def cosines(self, images: Tensor, texts: list[str]) -> Tensor:
        """Of each image with its text, `(B,)`; differentiable in the images."""
        return (self.embed_images(images) * self.embed_texts(texts)).sum(dim=1)
