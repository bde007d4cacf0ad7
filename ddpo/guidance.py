"""Classifier-free guidance: how a pipeline calls its denoiser for it, and how it combines what comes back.

A rule is found, not chosen: at load time the stock pipeline's own model output is compared with each rule's, and the
one that reproduces it exactly is kept (`ddpo.tracing.find_rule`). A pipeline with a combination of its own needs one
more row in `RULES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Layout = Literal["single", "stacked", "positive_first", "negative_first"]


@dataclass(frozen=True, kw_only=True)
class GuidanceRule:
    """One way to guide.

    Attributes:
        name: For messages.
        layout: `single` is one call on the positive condition; `stacked` one call on [negative, positive] rows; the
            other two are two calls, in that order.
        combine: (negative, positive, scale) -> guided output, all (B, *latent); negative is None for `single`.
    """

    name: str
    layout: Layout
    combine: Callable[[Tensor | None, Tensor, float], Tensor]


def no_guidance(negative: Tensor | None, positive: Tensor, scale: float) -> Tensor:
    """The conditional prediction as it is."""
    return positive


def linear(negative: Tensor | None, positive: Tensor, scale: float) -> Tensor:
    """Extrapolates from the unconditional prediction (Ho and Salimans, arXiv:2207.12598, eq. 6 with scale = 1 + w)."""
    assert negative is not None, "a rule with two branches"
    return negative + scale * (positive - negative)


def first_half(negative: Tensor | None, positive: Tensor, scale: float) -> Tensor:
    """Linear guidance of a network whose second half of channels is a learned variance, which is dropped."""
    return linear(negative, positive, scale).chunk(2, dim=1)[0]


RULES: tuple[GuidanceRule, ...] = (
    GuidanceRule(name="none", layout="single", combine=no_guidance),
    GuidanceRule(name="stacked", layout="stacked", combine=linear),
    GuidanceRule(name="stacked, learned variance", layout="stacked", combine=first_half),
    GuidanceRule(name="two calls, positive first", layout="positive_first", combine=linear),
    GuidanceRule(name="two calls, negative first", layout="negative_first", combine=linear),
)
