"""The course of a reward's weight over a run: a pure function of the epoch, so that a resumed run goes on exactly.

    linear   w(e) interpolates linearly between the knots (e_i, f_i), constant before the first and after the last
    step     w(e) = f_i of the last knot with e_i <= e, f_0 before the first

A curriculum (Bengio et al. 2009) brings a hard or exploitable reward in late, or lets an easy one fade.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from rewards.base import UserError


@dataclass(frozen=True, kw_only=True)
class WeightSchedule:
    """Factors on a weight at given epochs.

    Attributes:
        epochs: Numbers of finished epochs, rising.
        factors: What the weight is multiplied by there, one for each.
        kind: `linear` between these points, or `step` from each to the next.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    epochs: tuple[int, ...]
    factors: tuple[float, ...]
    kind: Literal["linear", "step"] = "linear"

    def __post_init__(self) -> None:
        epochs, factors = list(self.epochs), list(self.factors)
        if not epochs or epochs[0] < 0 or any(a >= b for a, b in zip(epochs, epochs[1:], strict=False)):
            raise UserError(f"epochs must be at least one number, from 0 and rising, got {epochs}")
        if len(factors) != len(epochs) or not all(map(math.isfinite, factors)):
            raise UserError(f"factors must be {len(epochs)} finite numbers, one for each epoch, got {factors}")

    def at(self, epoch: int) -> float:
        """The factor after `epoch` finished epochs."""
        after = bisect.bisect_right(self.epochs, epoch)
        if after == 0 or after == len(self.epochs):
            return self.factors[max(0, after - 1)]
        low, high = self.factors[after - 1], self.factors[after]
        if self.kind == "step":
            return low
        start, end = self.epochs[after - 1], self.epochs[after]
        return low + (high - low) * (epoch - start) / (end - start)
