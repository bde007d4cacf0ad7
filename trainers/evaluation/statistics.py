"""Means of evaluations and how far they may be off, as statements about captions like these.

The pictures of one caption count as one draw (`rewards.clusters`); differences between two evaluations are paired,
picture by picture, before their error is taken. An evaluation of a single caption speaks of pictures of that caption.
An interval is Student's, of C - 1 degrees of freedom: an error that few captions tell is itself uncertain.

E images of C captions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from rewards.clusters import standard_error


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A mean with its standard error; `None` where a single value leaves it undefined."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Tensor, captions: Tensor) -> "Measure":
        """Mean and standard error of values (n,).

        Args:
            values: One for each of the E images, or one for each E / n images of a caption that follow each other.
            captions: Numbers of the images' captions, (E,) int64.
        """
        clusters = captions[:: len(captions) // len(values)]
        return cls(mean=float(values.double().mean()), error=standard_error(values, clusters))

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + ("" if self.error is None else f" ± {self.error:.2g}")

    @property
    def signed(self) -> str:
        """As `str`, with the sign of the mean."""
        return f"{self.mean:+.4g}" + ("" if self.error is None else f" ± {self.error:.2g}")

    @property
    def in_errors(self) -> str:
        """The mean in standard errors, with its sign; empty where there is no error."""
        return f"{self.mean / self.error:+.1f}" if self.error else ""


def half_width(captions: Tensor, level: float = 0.95) -> float:
    """Standard errors from the mean to either end of its interval: Student's quantile.

    Args:
        captions: Numbers of the images' captions, (E,) int64; two images at least.
        level: Of the interval, in (0, 1).
    """
    distinct = len(captions.unique())
    draws = distinct if distinct > 1 else len(captions)
    return float(stats.t.isf((1 - level) / 2, draws - 1))


def numbered(captions: Sequence[str]) -> Tensor:
    """Numbers of E captions, equal for equal texts, (E,) int64."""
    known: dict[str, int] = {}
    return torch.tensor([known.setdefault(caption, len(known)) for caption in captions])


def population(captions: Sequence[str]) -> str:
    """What the errors of a table of evaluations speak of, one line."""
    count = len(set(captions))
    pictures = f"{len(captions) / count:.3g} picture{'' if len(captions) == count else 's'} each"
    interval = f"; 95%: {half_width(numbered(captions)):.2f} of them" if len(captions) > 1 else ""
    error = f"± one standard error{interval}"
    if count == 1:
        return f"{error}, for pictures of this caption ({len(captions)} of them)"
    return f"{error}, for captions like these {count} ({pictures}; those of a caption count as one draw)"
