"""Constraints on expectations by an augmented Lagrangian: maximise E[r] subject to E[s_i] >= a_i or E[s_i] <= b_i.

With the violations c_i = a_i - E[s_i] or E[s_i] - b_i, which must not be positive, the Powell-Hestenes-Rockafellar
function is (Rockafellar 1973; Nocedal & Wright, Numerical Optimization, 2nd ed., section 17.4)

    L(theta, lambda) = E[r] - sum_i ( max(0, lambda_i + rho_i c_i)^2 - lambda_i^2 ) / (2 rho_i)
    grad L           = grad E[r] - sum_i m_i grad c_i,        m_i = max(0, lambda_i + rho_i c_i)
    lambda_i        <- max(0, lambda_i + eta_i c_i)           (the method of multipliers has eta = rho)

so that a policy gradient of the reward r + m_i s_i (for >=) or r - m_i s_i (for <=) ascends L. A fixed point meets the
conditions of Karush, Kuhn and Tucker: c_i <= 0, lambda_i >= 0, lambda_i c_i = 0, grad E[r] = sum_i lambda_i grad c_i.

The method of multipliers maximises over theta before each update of lambda; here lambda follows after every epoch, on
the epoch's mean, as in dual ascent. The quadratic term damps the oscillation that dual ascent alone has. Both m and the
update use a mean over N samples in place of the expectation: m is then biased by at most rho times its standard error,
s / sqrt(N), and only near m = 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ddpo.validation import check

KL_NAME = "kl"


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """A bound on the mean of a reward, or on the path KL.

    Attributes:
        reward: What is bounded: a reward's name, a component such as `shapes/partial` of a reward that is listed, or
            `kl`, the path KL to the pretrained model in nats.
        at_least: Lower bound of the mean.
        at_most: Upper bound of the mean; give one of the two.
        penalty: rho, reward units per squared unit of what is bounded: how hard the present violation pushes.
        rate: Change of the multiplier per epoch and unit of violation; null takes `penalty`.
        multiplier: lambda to start with, reward units per unit of what is bounded.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    reward: str
    at_least: float | None = None
    at_most: float | None = None
    penalty: float = 1.0
    rate: float | None = None
    multiplier: float = 0.0

    def __post_init__(self) -> None:
        check(bool(self.reward.strip()), "reward", self.reward, "a reward's name, or kl")
        bounds = [bound for bound in (self.at_least, self.at_most) if bound is not None]
        check(len(bounds) == 1, "at_least", self.at_least, f"given, or at_most (now {self.at_most}), and not both")
        check(math.isfinite(bounds[0]), "at_least" if self.at_most is None else "at_most", bounds[0], "finite")
        for name in ("penalty", "multiplier"):
            value = getattr(self, name)
            check(0 <= value < math.inf, name, value, "at least 0 and finite")
        check(0 <= self.step < math.inf, "rate", self.rate, "at least 0 and finite, or null")
        check(self.penalty + self.step > 0, "penalty", self.penalty, "positive when rate is 0 or null")
        wrong = self.reward == KL_NAME and self.at_most is None
        check(not wrong, "at_most", self.at_most, "given for kl, which is bounded from above")

    @property
    def step(self) -> float:
        """The rate eta of the multiplier."""
        return self.penalty if self.rate is None else self.rate

    @property
    def sign(self) -> int:
        """Of the bounded mean in the objective: +1 where more is wanted, -1 where less is."""
        return 1 if self.at_most is None else -1

    def violation(self, mean: float) -> float:
        """c: how far the mean is on the wrong side of the bound; at most 0 where it is fine."""
        return self.at_least - mean if self.at_least is not None else mean - (self.at_most or 0.0)


class Multipliers:
    """The multipliers of some constraints, by the name of what they bound."""

    def __init__(self, constraints: Sequence[Constraint]) -> None:
        """Starts at the configured multipliers.

        Args:
            constraints: Of different names.
        """
        self.constraints = {constraint.reward: constraint for constraint in constraints}
        self.values = {name: constraint.multiplier for name, constraint in self.constraints.items()}

    def weights(self, means: Mapping[str, float]) -> dict[str, float]:
        """Weights m of the constraints at the present means: what a score gets, without its sign."""
        return {
            name: max(0.0, self.values[name] + constraint.penalty * constraint.violation(means[name]))
            for name, constraint in self.constraints.items()
        }

    def update(self, means: Mapping[str, float]) -> None:
        """One step of the multipliers."""
        for name, constraint in self.constraints.items():
            self.values[name] = max(0.0, self.values[name] + constraint.step * constraint.violation(means[name]))

    def state_dict(self) -> dict[str, float]:
        """Multipliers by name, for JSON."""
        return dict(self.values)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continues from `state_dict()`.

        Raises:
            ValueError: The state belongs to other constraints.
        """
        if set(state) != set(self.values):
            raise ValueError(
                f"the saved multipliers are of {', '.join(sorted(state)) or 'nothing'}, this run's constraints of "
                f"{', '.join(sorted(self.values)) or 'nothing'}; resume with the constraints the run was started with"
            )
        self.values = {name: float(state[name]) for name in self.values}
