"""Small heads on frozen embeddings: linear layers without activations, as published for aesthetics and ImageReward.

    score = A_n (... (A_1 e + b_1) ...) + b_n

The files name the layers by their place in a torch Sequential, `prefix.0.weight`, `prefix.2.weight`, ...; the missing
numbers are dropout, which does nothing in evaluation. A product of matrices is one matrix, but the layers are kept, so
that rounding is that of the published code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from rewards.base import UserError

_LAYER = re.compile(r"(?:.*\.)?(\d+)\.weight")


def linear_head(reward: str, tensors: Mapping[str, Tensor], *, width: int) -> nn.Sequential:
    """The layers of a state dict in order, frozen, in float32.

    Args:
        reward: Name of the reward, for messages.
        tensors: `prefix.<place>.weight` and `.bias`, other entries not allowed.
        width: Dimensions of the embedding.

    Raises:
        UserError: The tensors are no chain of linear layers from `width` to 1.
    """
    found = {match[1]: name for name in tensors if (match := _LAYER.fullmatch(name))}
    names = [found[place] for place in sorted(found, key=int)]
    biases = [f"{name.removesuffix('weight')}bias" for name in names]
    shapes = [tuple(tensors[name].shape) for name in names]
    is_chain = (
        bool(names)
        and set(tensors) == {*names, *biases}
        and all(len(shape) == 2 for shape in shapes)
        and all(first[0] == second[1] for first, second in pairwise(shapes))
    )
    if not is_chain:
        raise UserError(f"reward {reward!r}: the head holds {', '.join(tensors)}, which is no chain of linear layers")
    if shapes[0][1] != width or shapes[-1][0] != 1:
        raise UserError(
            f"reward {reward!r}: the head maps {shapes[0][1]} to {shapes[-1][0]} dimensions, the embedding has {width} "
            f"and a score 1: encoder and head belong to different models"
        )
    layers = []
    for name, bias in zip(names, biases, strict=True):
        layer = nn.utils.skip_init(nn.Linear, tensors[name].shape[1], tensors[name].shape[0])
        with torch.no_grad():
            layer.weight.copy_(tensors[name])
            layer.bias.copy_(tensors[bias])
        layers.append(layer)
    return nn.Sequential(*layers).eval().requires_grad_(False)
