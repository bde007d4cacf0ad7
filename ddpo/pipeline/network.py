"""The network that is called for a pipeline's denoiser: the module itself, its compiled form, or another."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from diffusers import ModelMixin
from torch import Tensor, nn


class Network:
    """A denoiser as it is called; one for all policies over a pipeline.

    Attributes:
        module: The network itself, with its adapter if it has one.
        batch_sizes: Numbers of samples per call that it was compiled for; empty for any number.
        rows: How many have gone through it, whichever form of it was called.
    """

    def __init__(self, module: ModelMixin) -> None:
        """Calls the module itself."""
        self.module = module
        self.batch_sizes: tuple[int, ...] = ()
        self.rows = 0
        self._called: nn.Module = module

    def __call__(self, rows: int, /, **arguments: object) -> tuple[Tensor | list[Tensor], ...]:
        """Runs what is called at present on latents of so many rows."""
        self.rows += rows
        return cast("tuple[Tensor | list[Tensor], ...]", self._called(**arguments))

    def compile(self, batch_sizes: Collection[int], *, backend: str) -> None:
        """Calls the compiled module from now on, for these numbers of samples per call."""
        self._called = compiled(self.module, backend=backend)
        self.batch_sizes = tuple(sorted(set(batch_sizes)))

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Calls the module itself, with any number of samples, for the time of a `with` block."""
        sizes, self.batch_sizes = self.batch_sizes, ()
        try:
            with self.calling(self.module):
                yield
        finally:
            self.batch_sizes = sizes

    @contextmanager
    def calling(self, network: nn.Module) -> Iterator[None]:
        """Calls another network in its place, for the time of a `with` block."""
        called, self._called = self._called, network
        try:
            yield
        finally:
            self._called = called


def compiled(network: nn.Module, *, backend: str) -> nn.Module:
    """A network compiled once for each shape of its input, with the same weights."""
    return cast(nn.Module, torch.compile(network, dynamic=False, backend=backend))
