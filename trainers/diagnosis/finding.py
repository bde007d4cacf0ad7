"""What a rule says about a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["fine", "look", "wrong"]
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One diagnosis.

    Attributes:
        name: What it is called.
        verdict: How bad it is.
        evidence: Why, in numbers.
        cure: The key to change, and to what; empty where there is nothing to do.
        series: What shows it, by epoch.
    """

    name: str
    verdict: Verdict
    evidence: str
    cure: str = ""
    series: Sequence[float] = field(default=())

    @property
    def sentence(self) -> str:
        """In one line."""
        return f"{self.name}: {self.evidence}" + (f"; change {self.cure}" if self.cure else "")

    def lines(self) -> list[str]:
        """For a terminal."""
        plot = f"  {sparkline(self.series)}" if len(self.series) > 1 else ""
        cure = [f"         change: {self.cure}"] if self.cure else []
        return [f"{self.verdict:<7}  {self.name}: {self.evidence}{plot}", *cure]


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A line of bars from the least to the largest value, each the mean of as many values."""
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, span = min(means), max(means) - min(means)
    return "".join(_BARS[round((len(_BARS) - 1) * (value - low) / span) if span else 0] for value in means)


def rounded(value: float, digits: int = 3) -> str:
    """A number to so many digits, written out below a million: 1110 for 1112, not 1.11e+03."""
    return f"{float(f'{value:.{digits}g}'):.6g}"
