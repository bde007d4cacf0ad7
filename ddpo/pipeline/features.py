"""The middle of a denoiser, read while it runs: what its layers say of a state, pooled over places.

    a U-Net         outputs of every block on the way down, and of the middle: one scale each
    a transformer   the output of the block in the middle of its longest list

Of each output the mean and the standard deviation over places, (C, H, W) or (L, C) to 2 C, brought to mean 0 and
variance 1. With guidance by two branches, in one call or in two, the mean of both. Nothing is computed for it that the
network does not compute anyway. B samples, F features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddpo.validation import UserError


def read_modules(network: nn.Module) -> list[nn.Module]:
    """The modules of a denoiser whose outputs are read.

    Raises:
        UserError: It has no blocks.
    """
    down, middle = getattr(network, "down_blocks", None), getattr(network, "mid_block", None)
    if isinstance(down, nn.ModuleList):
        return [*down, *([middle] if isinstance(middle, nn.Module) else [])]
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList) and len(child) > 0]
    if not lists:
        raise UserError(
            f"critic.kind must be network with a {type(network).__name__}, got features: it has no blocks to read"
        )
    longest = max(lists, key=len)
    return [longest[(len(longest) - 1) // 2]]


class FeatureReader:
    """Reads some modules of one or more networks while they run, inside `reading`.

    Args:
        networks: Of the same architecture; those that may run.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self._modules = [read_modules(network) for network in networks]
        self._read: dict[int, list[Tensor]] = {}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Reads what runs in a `with` block."""
        hooks = [
            module.register_forward_hook(partial(self._keep, place))
            for modules in self._modules
            for place, module in enumerate(modules)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._read = {}

    def take(self, rows: int) -> Tensor:
        """What was read since the last time, of B samples, (B, F) float32.

        Args:
            rows: B.
        """
        parts = []
        for place in sorted(self._read):
            pooled = torch.cat(self._read[place])
            assert len(pooled) % rows == 0, "every sample went through as often"
            parts.append(functional.layer_norm(pooled.unflatten(0, (-1, rows)).mean(0), pooled.shape[1:]))
        self._read = {}
        return torch.cat(parts, dim=1)

    def _keep(self, place: int, module: nn.Module, inputs: object, output: object) -> None:
        """A forward hook."""
        kept = torch.cat([_pooled(tensor) for tensor in _tensors(output)], dim=1)
        self._read.setdefault(place, []).append(kept.detach())


def _tensors(output: object) -> list[Tensor]:
    """The tensors of places that a block returns: of a U-Net's block the first, of a transformer's all."""
    if isinstance(output, Tensor):
        return [output]
    assert isinstance(output, tuple), "blocks return tensors"
    return [entry for entry in output if isinstance(entry, Tensor)]


def _pooled(value: Tensor) -> Tensor:
    """Mean and deviation over places, of (B, C, ..., H, W) or (B, L, C) to (B, 2 C)."""
    value = value.float()
    flat = value.transpose(1, 2) if value.ndim == 3 else value.flatten(2)
    return torch.cat([flat.mean(2), flat.std(2, correction=0)], dim=1)
