"""Moving averages of trained weights: for evaluation and export, or as the old policy of an objective."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

Decay = Callable[[int], float]
When = Literal["step", "epoch"]


class Average:
    """average <- decay(n) * average + (1 - decay(n)) * weights, the n-th time (Polyak averaging).

    Attributes:
        average: The averaged weights by name.
        steps: Updates so far.
        after: When it is to be updated.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: Decay, *, after: When) -> None:
        """Starts at the present weights.

        Args:
            parameters: What is averaged, by name.
            decay: After n updates, in [0, 1).
            after: Whether it is updated after every optimizer `step` or every `epoch`.
        """
        self.steps = 0
        self.after = after
        self.average = {name: value.detach().clone() for name, value in parameters.items()}
        self._parameters = parameters
        self._decay = decay

    @torch.no_grad()
    def update(self) -> None:
        """Takes the present weights into the average."""
        decay = self._decay(self.steps)
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


def ramped(decay: float) -> Decay:
    """A decay that rises as (1 + n) / (10 + n) to its value, so that a short run is not held at its start."""
    return lambda steps: min(decay, (1 + steps) / (10 + steps))
