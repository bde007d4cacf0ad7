"""Keeps text encoders and VAE off the device while they are idle."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from ddpo.pipeline.experts import parts_of


class Offload:
    """Where everything but the denoiser rests between two uses.

    Attributes:
        enabled: Whether it rests on the CPU; else it stays on the device, and nothing here does anything.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, denoiser: ModelMixin, *, device: torch.device, enabled: bool
    ) -> None:
        """Takes the components of a pipeline.

        Args:
            pipeline: The stock pipeline.
            denoiser: Its denoiser, which never moves.
            device: Where it runs.
            enabled: Whether the others rest on the CPU.
        """
        self.enabled = enabled
        self._pipeline = pipeline
        self._kept = list(parts_of(denoiser).values())
        self._device = device

    def stored(self, encoding: Tensor) -> Tensor:
        """An encoding where it waits to be used."""
        return encoding.cpu() if self.enabled else encoding

    @contextmanager
    def auxiliaries(self) -> Iterator[None]:
        """Text encoders and VAE on the device, for the time of a `with` block."""
        if not self.enabled:
            yield
            return
        self._move(self._device)
        try:
            yield
        finally:
            self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        for component in self._pipeline.components.values():
            if isinstance(component, nn.Module) and not any(component is part for part in self._kept):
                component.to(device)
