"""The weight alpha of the KL penalty: fixed, or adapted so that the path KL meets a target.

The regularised objective is (DPOK, arXiv:2305.16381, with the cost-to-go that its estimator drops)

    J = E[ r(x_0) ] - alpha * E[ sum_k KL(pi(.|x_k) || pi_ref(.|x_k)) ],        alpha in reward units per nat.

`AdaptiveKL` turns it into "maximise E[r] subject to path KL <= target": alpha is the Lagrange multiplier, and the
controller is dual ascent on log alpha with a clipped, relative error (Ziegler et al., arXiv:1909.08593, section 2.2).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ddpo.validation import check


@dataclass(frozen=True, kw_only=True)
class FixedKL:
    """A constant weight.

    Attributes:
        alpha: Reward units per nat of path KL; 0 is the plain, unregularised algorithm (the KL is still reported).
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["fixed"] = "fixed"
    alpha: float = 0.0

    def __post_init__(self) -> None:
        check(0 <= self.alpha < math.inf, "alpha", self.alpha, "at least 0 and finite")


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL:
    """A weight that follows the measured path KL.

    Attributes:
        target: Path KL to hold, in nats summed over steps and latent dimensions.
        alpha: Initial weight, reward units per nat.
        rate: Change of log(alpha) per epoch and unit of relative error (KL - target) / target, the error clipped to
            [-1, 1].
        min_alpha: Lower bound of the weight.
        max_alpha: Upper bound of the weight.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["adaptive"] = "adaptive"
    target: float
    alpha: float = 0.01
    rate: float = 0.1
    min_alpha: float = 1e-6
    max_alpha: float = 1e3

    def __post_init__(self) -> None:
        check(self.target > 0, "target", self.target, "positive (nats)")
        check(self.rate > 0, "rate", self.rate, "positive")
        for name in ("target", "rate", "max_alpha"):
            check(getattr(self, name) < math.inf, name, getattr(self, name), "finite")
        check(0 < self.min_alpha <= self.max_alpha, "min_alpha", self.min_alpha, "positive and at most max_alpha")
        check(self.min_alpha <= self.alpha <= self.max_alpha, "alpha", self.alpha, "within [min_alpha, max_alpha]")


KLConfig = FixedKL | AdaptiveKL


def next_alpha(config: KLConfig, alpha: float, path_kl: float) -> float:
    """The weight for the next epoch.

    Args:
        config: Fixed or adaptive.
        alpha: The weight that was used in this epoch, reward units per nat.
        path_kl: Mean path KL measured in this epoch, nats.

    Returns:
        `config.alpha` when fixed; else the updated multiplier, inside its bounds.

    Raises:
        ValueError: An adaptive weight has no finite KL to follow.
    """
    if isinstance(config, FixedKL):
        return config.alpha
    if not math.isfinite(path_kl):
        raise ValueError(f"kl.kind: adaptive cannot follow a path KL of {path_kl} nats; the policy has diverged")
    error = min(1.0, max(-1.0, (path_kl - config.target) / config.target))
    return min(config.max_alpha, max(config.min_alpha, alpha * math.exp(config.rate * error)))
