"""Finds objects by name: OWLv2 (Minderer et al. 2023, arXiv:2306.09683), a detector that takes class names as text.

Each of its patches proposes a box and is given to the class whose text fits best, with the confidence sigmoid(logit).
Its input is the picture made square by black below or to the right, resized to 960 pixels, normalised as for CLIP: what
transformers' own processor makes, but for pictures larger than that, where the filter against aliasing differs.

GenEval itself uses Mask2Former trained on COCO, which marks the pixels of objects; OWLv2 has boxes only and takes any
class, not COCO's 80. Thresholds are therefore not comparable; see `rewards.builtin.geneval.reward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast, final

import torch
from torch import Tensor
from torch.nn import functional

from rewards.builtin.geneval.rules import Box, Found
from rewards.images.preprocessing import CLIP_MEAN, CLIP_STD, normalise, resize
from rewards.models.transformers_model import Tokenizer, load_network, setting
from rewards.models.weights import locate_folder

TEMPLATE = "a photo of a {}"


class _Output(Protocol):
    logits: Tensor
    pred_boxes: Tensor


class _Network(Protocol):
    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> _Output: ...


@final
class Detector:
    """An Owlv2ForObjectDetection and its tokenizer.

    Args:
        reward: Name of the reward, for messages.
        model: Local folder or `owner/name`.
        revision: Its commit on the hub.
        sha256: Expected hash of its `model.safetensors`; empty = not compared.
        device: Where it runs.

    Raises:
        ImportError: The package transformers is not installed.
        UserError: Files are missing, differ, or do not fit.
    """

    def __init__(self, *, reward: str, model: str, revision: str, sha256: str, device: torch.device) -> None:
        folder = locate_folder(reward, model, revision=revision, option="model", sha256=sha256)
        network = load_network(reward, "Owlv2ForObjectDetection", folder, device=device)
        self._side = setting(network, "vision_config.image_size")
        length = setting(network, "text_config.max_position_embeddings")
        self._network = cast(_Network, network)
        self._tokenize = Tokenizer(reward=reward, folder=folder, length=length, device=device)
        self._device = device

    @torch.no_grad()
    def __call__(self, images: Tensor, kinds: Sequence[str], *, threshold: float) -> list[dict[str, list[Found]]]:
        """Objects of each image by class, in no order.

        Args:
            images: `(B, 3, H, W)` in [0, 1].
            kinds: Names of the classes; every box goes to one of them.
            threshold: Confidence that a box must exceed.
        """
        size = len(images)
        ids, mask = self._tokenize([TEMPLATE.format(kind) for kind in kinds])
        output = self._network(
            input_ids=ids.repeat(size, 1),
            attention_mask=mask.repeat(size, 1),
            pixel_values=preprocess(images.to(self._device), self._side),
        )
        scores, labels = output.logits.float().sigmoid().max(dim=-1)  # (B, N)
        boxes = to_pixels(output.pred_boxes.float(), height=images.shape[-2], width=images.shape[-1])
        is_inside = (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)  # some lie wholly in the padding
        found: list[dict[str, list[Found]]] = []
        for b in range(size):
            objects: dict[str, list[Found]] = {kind: [] for kind in kinds}
            for n in ((scores[b] > threshold) & is_inside[b]).nonzero().flatten().tolist():
                box = cast(Box, tuple(boxes[b, n].tolist()))
                objects[kinds[int(labels[b, n])]].append(Found(box=box, score=float(scores[b, n])))
            found.append(objects)
        return found


def preprocess(images: Tensor, side: int) -> Tensor:
    """Images `(B, 3, H, W)` in [0, 1] to normalised squares `(B, 3, side, side)`, black below or to the right."""
    height, width = images.shape[-2:]
    longest = max(height, width)
    square = functional.pad(images.float(), (0, longest - width, 0, longest - height))
    return normalise(resize(square, (side, side), "bilinear"), CLIP_MEAN, CLIP_STD)


def to_pixels(boxes: Tensor, *, height: int, width: int) -> Tensor:
    """Centres and sizes `(..., 4)` in units of the padded square to corners in pixels, cut at the image's border."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    corners = torch.cat([centre - half, centre + half], dim=-1) * max(height, width)
    limit = corners.new_tensor([width, height, width, height])
    return corners.clamp(min=0).minimum(limit)
