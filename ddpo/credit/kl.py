"""The weight alpha of the KL penalty: fixed, or adapted so that the path KL meets a target.

The regularised objective is (DPOK, arXiv:2305.16381, with the cost-to-go that its estimator drops)

    J = E[ r(x_0) ] - alpha * E[ sum_k KL(pi(.|x_k) || pi_ref(.|x_k)) ],        alpha in reward units per nat.

`AdaptiveKL` turns it into "maximise E[r] subject to path KL <= target": alpha is the Lagrange multiplier, which
`ddpo.credit.kl_course` finds from the measured KL.

No policy of path KL t gains more than about s sqrt(2 t), s the rewards' standard deviation (exactly that for a linear
reward of Gaussians, by tilting), and what a nat is worth at the target is then s / sqrt(2 t). That is where the weight
starts: from above, so that the KL rises to its target.
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
        target: Path KL to hold, in nats summed over steps and latent dimensions; of chains with windows of noisy steps
            the KL that all steps would have with the sampler's full noise.
        alpha: Initial weight, reward units per nat; null takes the rewards' standard deviation in the first epoch over
            sqrt(2 target). One that is too large falls to what the target needs; one that is too small lets the KL
            overshoot.
        rate: Change of log(alpha) per epoch and unit of log(KL / target), once the KL is near its target.
        damping: Epochs by which the KL is extrapolated then, at least; longer where the KL took long to rise.
        min_alpha: Lower bound of the weight.
        max_alpha: Upper bound of the weight.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["adaptive"] = "adaptive"
    target: float
    alpha: float | None = None
    rate: float = 0.03
    damping: float = 5.0
    min_alpha: float = 1e-6
    max_alpha: float = 1e3

    def __post_init__(self) -> None:
        check(self.target > 0, "target", self.target, "positive (nats)")
        check(self.rate > 0, "rate", self.rate, "positive")
        check(self.damping >= 0, "damping", self.damping, "at least 0 (epochs)")
        for name in ("target", "rate", "damping", "max_alpha"):
            check(getattr(self, name) < math.inf, name, getattr(self, name), "finite")
        check(0 < self.min_alpha <= self.max_alpha, "min_alpha", self.min_alpha, "positive and at most max_alpha")
        inside = self.alpha is None or self.min_alpha <= self.alpha <= self.max_alpha
        check(inside, "alpha", self.alpha, "within [min_alpha, max_alpha], or null")

    def bounded(self, alpha: float) -> float:
        """The nearest weight inside the bounds."""
        return min(self.max_alpha, max(self.min_alpha, alpha))


KLConfig = FixedKL | AdaptiveKL


def first_alpha(config: KLConfig, std: float) -> float:
    """The weight of the first epoch.

    Args:
        config: Fixed or adaptive.
        std: Standard deviation of the epoch's rewards.
    """
    if config.alpha is not None:
        return config.alpha
    return config.bounded(std / math.sqrt(2 * config.target))
