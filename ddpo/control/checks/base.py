"""What a check is: something with an exact answer, and how far from it we land.

A check yields one `Measurement` for every number it compares; `ddpo verify` times it and prints one row for each.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Level = Literal["fast", "full", "slow"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number held against its exact value.

    Attributes:
        name: What was measured, a few words.
        exact: The exact value, as shown.
        obtained: What came out, as shown.
        error: The distance between the two, in the unit that the tolerance is in.
        tolerance: The largest error that passes.
    """

    name: str
    exact: float | str
    obtained: float | str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return bool(self.error <= self.tolerance)  # not numpy's, which JSON lacks


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check of one claim.

    Attributes:
        name: Short and unique within its group, such as `riccati`.
        group: What `--only` selects, such as `lqr`.
        claim: One sentence: what is true if this passes.
        level: `fast` runs always, `full` and `slow` when asked; each level holds those before it.
        run: Makes the measurements, with its own fixed seeds.
    """

    name: str
    group: str
    claim: str
    level: Level
    run: Callable[[], Iterator[Measurement]]
