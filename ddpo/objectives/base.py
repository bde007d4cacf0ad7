"""What an objective is: a generator of losses, on which the trainer only calls backward.

A policy-gradient objective gets micro-batches of independent transitions, of any samples and steps mixed, so that
memory is bounded by the micro-batch and not by the number of steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ddpo.trajectory import Transitions

if TYPE_CHECKING:  # the configurations of objectives are read without loading diffusers
    from ddpo.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Loss:
    """One loss and what was measured on the way.

    Attributes:
        value: Scalar with a graph; the losses of an update add up to the update's loss.
        metrics: Detached per-transition values by name, each (N,); the trainer averages them.
    """

    value: Tensor
    metrics: dict[str, Tensor]


Objective = Callable[["Policy", Transitions], Iterator[Loss]]
