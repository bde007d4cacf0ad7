"""An exponential moving average of the trained weights, for evaluation and export."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """average <- decay * average + (1 - decay) * weights, after every optimizer step (Polyak averaging).

    The decay is ramped up as min(decay, (1 + n) / (10 + n)) over n steps, so that a short run is not held at its start.

    Attributes:
        average: The averaged weights by name.
        steps: Updates so far.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.steps = 0
        self.average = {name: value.detach().clone() for name, value in parameters.items()} if decay > 0 else {}
        self._parameters = parameters
        self._decay = decay

    @torch.no_grad()
    def update(self) -> None:
        """Takes the present weights into the average."""
        if not self.average:
            return
        decay = min(self._decay, (1 + self.steps) / (10 + self.steps))
        for name, value in self.average.items():
            value.lerp_(self._parameters[name], 1 - decay)
        self.steps += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averaged weights in the model, for the time of a `with` block."""
        kept = {name: self._parameters[name].detach().clone() for name in self.average}
        self._copy(self.average)
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, source: Mapping[str, Tensor]) -> None:
        for name, value in source.items():
            self._parameters[name].copy_(value)
