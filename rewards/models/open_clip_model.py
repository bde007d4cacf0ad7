"""Image and text embeddings from any model of open_clip, with gradients to the pixels.

A model is named in one of these ways:

    model ViT-L-14-quickgelu, pretrained openai   an architecture and a weights tag of open_clip, downloaded
    model ViT-L-14, pretrained /data/weights.pt    an architecture and a local file (.pt, .safetensors)
    model local-dir:/data/folder                   open_clip_config.json and weights, with the tokenizer if it has one
    model hf-hub:owner/name                        the same from the Hugging Face hub, at a pinned revision

Preprocessing is what the model's configuration says (size, mean, std, resize mode), made differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from rewards.base import UserError
from rewards.downloads import Download
from rewards.images.preprocessing import Fit, Preprocessing
from rewards.models.first_download import check_first
from rewards.models.weights import OPEN_CLIP_FILES, check_hash, local_file, locate_folder
from rewards.optional import require

Encode = Callable[[Tensor], Tensor]

LOCAL, HUB = "local-dir:", "hf-hub:"
OPENAI = Download(file="ViT-L-14-quickgelu openai", library="open_clip")
"""The weights of rewards on CLIP ViT-L/14; which file they are is open_clip's to say."""


@final
class OpenClip:
    """A frozen open_clip model in float32.

    Args:
        reward: Name of the reward, for messages.
        model: See the module docstring.
        pretrained: Tag or file; unused for `local-dir:` and `hf-hub:` models, whose folder holds the weights.
        sha256: Expected hash of the weights file; empty = not compared.
        revision: Commit, for `hf-hub:`.
        device: Where it runs.
        fit: How pictures are fitted to the input, if not as the model's configuration says.

    Raises:
        ImportError: open_clip is not installed.
        UserError: Unknown model or tag, missing or other weights, no network.
    """

    def __init__(
        self,
        *,
        reward: str,
        model: str,
        pretrained: str = "",
        sha256: str = "",
        revision: str = "main",
        device: torch.device,
        fit: Fit | None = None,
    ) -> None:
        open_clip = require("open_clip", extra="open_clip", reward=reward)
        if model.startswith(HUB):
            folder = _snapshot(reward, model.removeprefix(HUB), revision)
            model = f"{LOCAL}{folder}"
        weights = _find_weights(open_clip, reward, model, pretrained, sha256)
        try:
            tag = None if model.startswith(LOCAL) else pretrained or None
            network = open_clip.create_model(model, pretrained=tag, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(model)
        except Exception as error:
            raise UserError(
                f"reward {reward!r}: open_clip cannot load {model} with {weights}: {type(error).__name__}: {error}"
            ) from error
        self.network: nn.Module = network.eval().requires_grad_(False).to(device)
        self._encode_image: Encode = network.encode_image
        self._encode_text: Encode = network.encode_text
        self.preprocess = _preprocessing(network.visual.preprocess_cfg, fit)
        self.device = device
        self._tokenizer = tokenizer

    @property
    def width(self) -> int:
        """Number of embedding dimensions."""
        with torch.no_grad():
            return self.embed_images(torch.zeros(1, 3, *self.preprocess.size)).shape[1]

    def embed_images(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [0, 1] to unit vectors `(B, D)`; differentiable."""
        pixels = self.preprocess(images.to(self.device))
        return functional.normalize(self._encode_image(pixels), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Texts to unit vectors `(B, D)`, truncated to the model's context."""
        tokens = self._tokenizer(texts).to(self.device)
        return functional.normalize(self._encode_text(tokens), dim=-1)

    def cosines(self, images: Tensor, texts: list[str]) -> Tensor:
        """Of each image with its text, `(B,)`; differentiable in the images."""
        return (self.embed_images(images) * self.embed_texts(texts)).sum(dim=1)


def _snapshot(reward: str, repository: str, revision: str) -> Path:
    folder = locate_folder(reward, repository, revision=revision, option="model", files=OPEN_CLIP_FILES)
    if not (folder / "open_clip_config.json").is_file():
        raise UserError(f"reward {reward!r}: {repository} has no open_clip_config.json, so it is no open_clip model")
    return folder


def _find_weights(open_clip: ModuleType, reward: str, model: str, pretrained: str, sha256: str) -> str:
    """Checks that the weights exist, and their hash; returns what messages call them."""
    if model.startswith(LOCAL):
        folder = Path(model.removeprefix(LOCAL))
        if not (folder / "open_clip_config.json").is_file():
            raise UserError(f"reward {reward!r}: option model: {folder} has no open_clip_config.json")
        if sha256:
            check_hash(reward, folder / "open_clip_model.safetensors", sha256)
        return f"the weights in {folder}"
    if model not in open_clip.list_models():
        raise UserError(f"reward {reward!r}: open_clip has no model {model!r}; open_clip.list_models() names them")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained in tags:
        published = open_clip.get_pretrained_cfg(model, pretrained)
        _check_activation(open_clip, reward, model, pretrained, published)
        try:
            path = open_clip.download_pretrained(published)
        except Exception as error:
            raise UserError(
                f"reward {reward!r} needs the open_clip weights {model} {pretrained}, which could not be downloaded "
                f"({type(error).__name__}); load them once on a machine with network, copy the file that "
                f"open_clip.download_pretrained(open_clip.get_pretrained_cfg({model!r}, {pretrained!r})) names there, "
                f"and set the option pretrained: FILE"
            ) from error
        if sha256:
            check_hash(reward, Path(path), sha256)
        else:
            cure = "copy the old file here and set the option pretrained: FILE"
            check_first(reward, f"open_clip {model} {pretrained}", Path(path), cure=cure)
        return f"tag {pretrained}"
    if "/" in pretrained or Path(pretrained).suffix or Path(pretrained).is_file():
        return str(local_file(reward, pretrained, option="pretrained", sha256=sha256))
    raise UserError(
        f"reward {reward!r}: {pretrained!r} is neither a file nor a weights tag of {model} "
        f"({', '.join(tags) or 'it has none'})"
    )


def _check_activation(
    open_clip: ModuleType, reward: str, model: str, pretrained: str, published: dict[str, object]
) -> None:
    """Refuses weights trained with an activation that the model is built without: open_clip only warns of it."""
    if published.get("quick_gelu") and not open_clip.get_model_config(model).get("quick_gelu"):
        raise UserError(
            f"reward {reward!r}: the weights {pretrained} of {model} were trained with QuickGELU, which {model} is "
            f"built without, so every score would be wrong; set the option model: {model}-quickgelu"
        )


def _preprocessing(config: dict[str, object], fit: Fit | None) -> Preprocessing:
    """From open_clip's dictionary; its interpolation other than bilinear is bicubic."""
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else cast(tuple[int, int], size)
    return Preprocessing(
        size=(height, width),
        fit=fit or cast(Fit, config["resize_mode"]),
        mean=cast(tuple[float, float, float], tuple(cast(list[float], config["mean"]))),
        std=cast(tuple[float, float, float], tuple(cast(list[float], config["std"]))),
        resample="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
    )
