"""Guidance by a value function, such as a trained critic: V_k(x), what is still to be earned from x at step k.

With the soft value V_k(x) = alpha log E[exp(r(x_T) / alpha) | x_k = x] of the tilted law, V_T = r, the best mean of a
step of the policy's mean mu and noise std is

    m = mu + std^2 grad V_{k+1}(m) / alpha        implicit: m maximises V_{k+1}(m) - alpha |m - mu|^2 / (2 std^2)
    m = mu + std^2 grad V_k(x_k) / alpha          explicit: off at first order in the step

The implicit equation is solved by rounds of m <- mu + std^2 grad V_{k+1}(m) / alpha from m = mu, which converge where
std^2 |hess V_{k+1}| < alpha. The other use of a value is as the potential of particles: log G_k is a difference of
V_k(x_k) / alpha instead of that of r(x0_hat); the weighted particles are exact for any V, and the better V is, the less
uneven they are.

B rows, `latent` the latent shape.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ddpo.sampling.gaussian import Gaussian
from ddpo.sampling.schedule import Schedule
from ddpo.steering.base import Score, State, Steer, Value
from ddpo.steering.kinds import FeynmanKacKind, TiltKind
from ddpo.trajectory import Condition
from ddpo.validation import UserError, check

if TYPE_CHECKING:  # the policy loads diffusers
    from ddpo.policy import Policy


@dataclass(frozen=True, kw_only=True)
class ValueGradient(Steer):
    """Shifts the means of noisy steps up a value; see the module docstring.

    Attributes:
        value: V, with a gradient by the states.
        alpha: Reward units per nat.
        rounds: Of the implicit equation; 0 for the explicit form.
    """

    value: Value
    alpha: float
    rounds: int

    def propose(self, state: State, policy: "Policy") -> Gaussian:
        """The policy's distribution with its mean shifted."""
        own = state.gaussian
        if state.k not in policy.schedule.stochastic_steps:
            return own
        scale = own.std**2 / self.alpha
        if self.rounds == 0:
            return replace(own, mean=own.mean + scale * self._gradient(state.k, state.x, state.condition))
        mean = own.mean
        for _ in range(self.rounds):
            mean = own.mean + scale * self._gradient(state.k + 1, mean, state.condition)
        return replace(own, mean=mean)

    @torch.enable_grad()
    def _gradient(self, k: int, x: Tensor, condition: Condition) -> Tensor:
        """Of V_k by its states, (B, *latent)."""
        leaf = x.detach().requires_grad_()
        values = self.value(k, leaf, condition)
        if values.shape != (len(x),) or not values.requires_grad:
            raise UserError(f"the value must be one number a row with a gradient by the states, got {_shown(values)}")
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        return gradient


def _shown(values: Tensor) -> str:
    return f"shape {tuple(values.shape)}, {'with' if values.requires_grad else 'without'} a gradient"


@dataclass(frozen=True, kw_only=True)
class ValueKind(TiltKind):
    """Guidance by the gradient of a value; only from Python, as a value is no word.

    Attributes:
        alpha: Reward units per nat, positive.
        value: V.
        rounds: Of the implicit equation; 0 for the explicit form.
    """

    needs_gradient: ClassVar[bool] = False
    particles: ClassVar[int] = 1
    passes: ClassVar[int] = 1
    kind: ClassVar[str] = "value"

    value: Value
    rounds: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.rounds >= 0, "rounds", self.rounds, "at least 0")

    def begin(self, score: Score, schedule: Schedule) -> Steer:
        """The same for every batch."""
        return ValueGradient(value=self.value, alpha=self.alpha, rounds=self.rounds)


@dataclass(frozen=True, kw_only=True)
class ValueParticles:
    """Particles whose potentials on the way are a value's.

    Attributes:
        value: V.
        particles_as: All else of them.
    """

    needs_noise: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = False
    weighs: ClassVar[bool] = True
    kind: ClassVar[str] = "value_particles"

    value: Value
    particles_as: FeynmanKacKind

    @property
    def particles(self) -> int:
        """Chains of a sample."""
        return self.particles_as.particles

    @property
    def passes(self) -> int:
        """One for each particle."""
        return self.particles

    def begin(self, score: Score, schedule: Schedule) -> Steer:
        """Particles without weights."""
        return replace(self.particles_as.begin(score, schedule), value=self.value)
