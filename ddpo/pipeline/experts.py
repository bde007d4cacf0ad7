"""Several networks of one pipeline, each of which denoises a part of the chain (Wan 2.2 A14B)."""

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from diffusers import ModelMixin
from torch import nn


class Experts(nn.Module):
    """The networks as one: an adapter, a copy and a device are theirs together, a call is for one of them."""

    def __init__(self, parts: Mapping[str, ModelMixin]) -> None:
        """Takes the networks by their component names."""
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.config = next(iter(parts.values())).config

    def forward(self, *, expert: str, **arguments: object) -> object:
        """Runs one of them."""
        return self.get_submodule(expert)(**arguments)

    @property
    def dtype(self) -> torch.dtype:
        """Of the first one's weights."""
        return next(self.parameters()).dtype

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return any(part.is_gradient_checkpointing for part in self._parts())

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes activations in the backward pass."""
        for part in self._parts():
            part.enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        """Keeps activations for the backward pass."""
        for part in self._parts():
            part.disable_gradient_checkpointing()

    def _parts(self) -> Iterator[ModelMixin]:
        return cast("Iterator[ModelMixin]", self.children())


def parts_of(network: nn.Module) -> dict[str, nn.Module]:
    """The networks by their component names; a single one by an empty name."""
    return dict(network.named_children()) if isinstance(network, Experts) else {"": network}
