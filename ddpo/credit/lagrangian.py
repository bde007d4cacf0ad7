"""Constraints on expectations by an augmented Lagrangian: maximise E[r] subject to E[s_i] >= a_i or E[s_i] <= b_i.

With the violations c_i = a_i - E[s_i] or E[s_i] - b_i, which must not be positive, the Powell-Hestenes-Rockafellar
function is (Rockafellar 1973; Nocedal & Wright, Numerical Optimization, 2nd ed., section 17.4)

    L(theta, lambda) = E[r] - sum_i ( max(0, lambda_i + rho_i c_i)^2 - lambda_i^2 ) / (2 rho_i)
    grad L           = grad E[r] - sum_i m_i grad c_i,        m_i = max(0, lambda_i + rho_i c_i)
    lambda_i        <- max(0, lambda_i + eta_i c_i)           (the method of multipliers has eta = rho)

so that a policy gradient of the reward r + m_i s_i (for >=) or r - m_i s_i (for <=) ascends L. A fixed point meets the
conditions of Karush, Kuhn and Tucker: c_i <= 0, lambda_i >= 0, lambda_i c_i = 0, grad E[r] = sum_i lambda_i grad c_i.

The method of multipliers maximises over theta before each update of lambda; here lambda follows after every epoch, on
the epoch's mean, as in dual ascent. The quadratic term damps the oscillation that dual ascent alone has. The score of a
sample gets the m that the mean of the other samples gives: with its own in it, the gradient would be off by rho times
the variance of s over N.

Two other ways to keep a bound are weights of the same kind:

    exact     E[r] - sum_i mu_i max(0, c_i)          m_i = mu_i where c_i > 0, else 0;  exact for mu_i >= lambda_i*
              (Nocedal & Wright, section 17.2)        mu_i <- mu_i + eta_i max(0, c_i)
    barrier   E[r] + sum_i t_i log(-c_i)             m_i = t_i / -c_i, and beyond c_i = -d (d the margin) the tangent
              (section 19.6; relaxed: Hauser &        t_i / d (2 + c_i / d), so that a bound that is broken pulls back
              Saccon, CDC 2006)                       t_i <- (1 - eta_i) t_i

The exact penalty needs no multiplier but pushes with full weight or none, so that a policy chatters about the bound.
The barrier keeps inside it at a price of t_i in the objective (m_i c_i = -t_i); m_i tends to lambda_i* as t_i falls.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ddpo.validation import UserError, check

KL_NAME = "kl"


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """A bound on the mean of a reward, or on the path KL.

    Attributes:
        reward: What is bounded: a reward's name, a component such as `shapes/partial` of a reward that is listed, or
            `kl`, the path KL to the pretrained model in nats.
        at_least: Lower bound of the mean.
        at_most: Upper bound of the mean; give one of the two.
        method: `augmented` Lagrangian, `exact` penalty, or logarithmic `barrier`; see `ddpo.credit.lagrangian`.
        penalty: How hard the bound pushes. `augmented`: rho, reward units per squared unit of what is bounded. `exact`:
            mu, reward units per unit. `barrier`: t, reward units.
        rate: What changes per epoch: `augmented`, the multiplier, per unit of violation; null takes `penalty`. `exact`,
            mu, per unit of violation; null for none. `barrier`, the share by which t falls; null for none.
        multiplier: lambda of `augmented` to start with, reward units per unit of what is bounded.
        margin: d of `barrier`, in units of what is bounded: how near the bound the barrier stops to grow steeper.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    reward: str
    at_least: float | None = None
    at_most: float | None = None
    method: Literal["augmented", "exact", "barrier"] = "augmented"
    penalty: float = 1.0
    rate: float | None = None
    multiplier: float = 0.0
    margin: float | None = None

    def __post_init__(self) -> None:
        check(bool(self.reward.strip()), "reward", self.reward, "a reward's name, or kl")
        bounds = [bound for bound in (self.at_least, self.at_most) if bound is not None]
        check(len(bounds) == 1, "at_least", self.at_least, f"given, or at_most (now {self.at_most}), and not both")
        check(math.isfinite(bounds[0]), "at_least" if self.at_most is None else "at_most", bounds[0], "finite")
        for name in ("penalty", "multiplier"):
            value = getattr(self, name)
            check(0 <= value < math.inf, name, value, "at least 0 and finite")
        check(0 <= self.step < math.inf, "rate", self.rate, "at least 0 and finite, or null")
        pushes = self.penalty + (self.step if self.method == "augmented" else 0) > 0
        check(pushes, "penalty", self.penalty, "positive when rate is 0 or null, and with exact and barrier")
        barrier = self.method == "barrier"
        check(not barrier or self.step < 1, "rate", self.rate, "below 1 with barrier (the share by which it falls)")
        known = self.margin is not None and 0 < self.margin < math.inf
        check(known == barrier, "margin", self.margin, "positive with barrier, and null with the other methods")
        own = self.method == "augmented" or self.multiplier == 0
        check(own, "multiplier", self.multiplier, "0 with exact and barrier, which have none")
        wrong = self.reward == KL_NAME and self.at_most is None
        check(not wrong, "at_most", self.at_most, "given for kl, which is bounded from above")

    @property
    def step(self) -> float:
        """The rate eta."""
        default = self.penalty if self.method == "augmented" else 0.0
        return default if self.rate is None else self.rate

    @property
    def start(self) -> float:
        """What changes from epoch to epoch, at the start: lambda, mu or t."""
        return self.multiplier if self.method == "augmented" else self.penalty

    def weight(self, value: float, violation: Tensor) -> Tensor:
        """The weight m at a present lambda, mu or t, for violations of any shape."""
        if self.method == "augmented":
            return (value + self.penalty * violation).clamp(min=0.0)
        if self.method == "exact":
            return value * (violation > 0).to(violation)
        assert self.margin is not None
        inside = violation.clamp(max=-self.margin)
        return torch.where(
            violation < -self.margin, value / -inside, value / self.margin * (2 + violation / self.margin)
        )

    def next(self, value: float, violation: float) -> float:
        """lambda, mu or t of the next epoch."""
        if self.method == "augmented":
            return max(0.0, value + self.step * violation)
        if self.method == "exact":
            return value + self.step * max(0.0, violation)
        return (1 - self.step) * value

    @property
    def sign(self) -> int:
        """Of the bounded mean in the objective: +1 where more is wanted, -1 where less is."""
        return 1 if self.at_most is None else -1

    def violation(self, mean: Tensor) -> Tensor:
        """c: how far means are on the wrong side of the bound; at most 0 where it is fine."""
        return self.at_least - mean if self.at_least is not None else mean - (self.at_most or 0.0)


class Multipliers:
    """What some constraints carry from epoch to epoch, by the name of what they bound: lambda, mu or t."""

    def __init__(self, constraints: Sequence[Constraint]) -> None:
        """Starts at the configured values.

        Args:
            constraints: Of different names.
        """
        self.constraints = {constraint.reward: constraint for constraint in constraints}
        self.values = {name: constraint.start for name, constraint in self.constraints.items()}

    def weights(self, means: Mapping[str, float]) -> dict[str, float]:
        """Weights m of the constraints at the present means: what a score gets, without its sign."""
        return {
            name: float(self._weight(name, torch.tensor(means[name], dtype=torch.float64))) for name in self.constraints
        }

    def weights_of_samples(self, name: str, scores: Tensor) -> Tensor:
        """Weights m of N samples, each by the mean of the others' scores (N,); that of its own where it is alone."""
        scores = scores.double()
        others = (scores.sum() - scores) / (len(scores) - 1) if len(scores) > 1 else scores
        return self._weight(name, others)

    def _weight(self, name: str, means: Tensor) -> Tensor:
        constraint = self.constraints[name]
        return constraint.weight(self.values[name], constraint.violation(means))

    def update(self, means: Mapping[str, float]) -> None:
        """One step of what changes, by the means over all samples."""
        for name, constraint in self.constraints.items():
            violation = float(constraint.violation(torch.tensor(means[name], dtype=torch.float64)))
            self.values[name] = constraint.next(self.values[name], violation)

    def state_dict(self) -> dict[str, float]:
        """Multipliers by name, for JSON."""
        return dict(self.values)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continues from `state_dict()`.

        Raises:
            UserError: The state belongs to other constraints.
        """
        if set(state) != set(self.values):
            raise UserError(
                f"the saved multipliers are of {', '.join(sorted(state)) or 'nothing'}, this run's constraints of "
                f"{', '.join(sorted(self.values)) or 'nothing'}; resume with the constraints the run was started with"
            )
        self.values = {name: float(state[name]) for name in self.values}
