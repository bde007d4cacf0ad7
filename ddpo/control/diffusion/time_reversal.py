"""Generation by a diffusion is a control problem: time reversal, its value function, and the verification identity.

A forward SDE dY = f(Y, t) dt + sigma(t) dB turns data into noise, with marginals p_t. Running time backwards, with
mu(x, t) = -f(x, T - t) and Sigma(t) = sigma(T - t), a control u steers

    dX = (mu + Sigma u) dt + Sigma dW,   X_0 ~ p_T
    J(u) = E [ int_0^T (|u|^2 / 2 - div mu) dt - log p_0(X_T) ]

V(x, t) = -log p_{T-t}(x) solves the HJB equation of J, the optimal control is Sigma^T grad log p_{T-t}, and Ito's
formula gives for every control u, optimal or not (Berner et al., arXiv:2211.01364)

    J(u) = E V(X_0, 0) + 1/2 E int_0^T |u - u*|^2 dt

along the paths of u. The difference of the two sides on a single path is -int u* . dW; adding that integral back
leaves a difference that vanishes with the step size alone, which tells an error of the formula from Monte Carlo
noise.

The SDEs are the variance-preserving and variance-exploding ones of Song et al. (arXiv:2011.13456, eq. 11, 9 and
appendix B), on t in [0, 1]: f(x, t) = c(t) x, marginal Y_t = a_t Y_0 + s_t eps. B paths, d dimensions, float64.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ddpo.control.problems.mixture import GaussianMixture

Control = Callable[[Tensor, Tensor], Tensor]
"""u(x, t), (B, d), of states (B, d) and a scalar time."""

Scheme = Literal["euler", "heun"]


class ForwardSDE(ABC):
    """dY = c(t) Y dt + sigma(t) dB on [0, 1]; times are scalar float64 tensors and results differentiable in them."""

    horizon: float = 1.0

    @abstractmethod
    def rate(self, t: Tensor) -> Tensor:
        """c(t), the drift f(x, t) divided by x."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """sigma(t)."""

    @abstractmethod
    def scale(self, t: Tensor) -> Tensor:
        """a_t = exp int_0^t c, the factor of the data."""

    @abstractmethod
    def std(self, t: Tensor) -> Tensor:
        """s_t, the standard deviation of the noise."""


@dataclass(frozen=True, kw_only=True)
class VPSDE(ForwardSDE):
    """Variance preserving, linear beta: c = -beta(t) / 2, sigma^2 = beta(t), s^2 = 1 - a^2.

    Attributes:
        beta_min: beta(0) > 0, per unit of time.
        beta_max: beta(1) >= beta_min.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(f"beta_min {self.beta_min}, beta_max {self.beta_max}: give 0 < beta_min <= beta_max")

    def _integral(self, t: Tensor) -> Tensor:
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2

    def rate(self, t: Tensor) -> Tensor:
        """-beta(t) / 2."""
        return -0.5 * (self.beta_min + t * (self.beta_max - self.beta_min))

    def diffusion(self, t: Tensor) -> Tensor:
        """Root of beta(t)."""
        return (self.beta_min + t * (self.beta_max - self.beta_min)).sqrt()

    def scale(self, t: Tensor) -> Tensor:
        """exp(-1/2 int beta)."""
        return torch.exp(-0.5 * self._integral(t))

    def std(self, t: Tensor) -> Tensor:
        """Root of 1 - exp(-int beta)."""
        return (-torch.expm1(-self._integral(t))).sqrt()


@dataclass(frozen=True, kw_only=True)
class VESDE(ForwardSDE):
    """Variance exploding: c = 0, a = 1, s^2 = v(t) - v(0) with v(t) = sigma_min^2 (sigma_max / sigma_min)^(2 t).

    Attributes:
        sigma_min: > 0, in the unit of the data.
        sigma_max: > sigma_min.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min}, sigma_max {self.sigma_max}: give 0 < sigma_min < sigma_max")

    def rate(self, t: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """Root of dv/dt."""
        log_ratio = math.log(self.sigma_max / self.sigma_min)
        return self.sigma_min * torch.exp(t * log_ratio) * math.sqrt(2 * log_ratio)

    def scale(self, t: Tensor) -> Tensor:
        """One."""
        return torch.ones_like(t)

    def std(self, t: Tensor) -> Tensor:
        """Root of v(t) - v(0)."""
        log_ratio = math.log(self.sigma_max / self.sigma_min)
        return self.sigma_min * torch.expm1(2 * t * log_ratio).sqrt()


@dataclass(frozen=True, kw_only=True)
class TimeReversal:
    """The control problem whose solution generates `data`.

    Attributes:
        data: The law to be generated.
        sde: The forward SDE.
    """

    data: GaussianMixture
    sde: ForwardSDE

    def _forward_marginal(self, t: Tensor) -> GaussianMixture:
        """p_{T-t}."""
        forward_time = self.sde.horizon - t
        if float(forward_time.detach()) <= 0:
            return self.data
        return self.data.marginal(self.sde.scale(forward_time), self.sde.std(forward_time))

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """mu(x, t) = -f(x, T - t), (B, d)."""
        return -self.sde.rate(self.sde.horizon - t) * x

    def divergence(self, t: Tensor) -> Tensor:
        """The divergence of mu, a scalar, the same at every x."""
        return -self.sde.rate(self.sde.horizon - t) * self.data.dim

    def diffusion(self, t: Tensor) -> Tensor:
        """Sigma(t), a scalar that multiplies the identity."""
        return self.sde.diffusion(self.sde.horizon - t)

    def value(self, x: Tensor, t: Tensor) -> Tensor:
        """V(x, t) = -log p_{T-t}(x), (B,) nats; differentiable in x and, before the end, in t."""
        return -self._forward_marginal(t).log_prob(x)

    def optimal_control(self, x: Tensor, t: Tensor) -> Tensor:
        """u*(x, t) = Sigma^T grad log p_{T-t}(x), (B, d)."""
        return self.diffusion(t) * self._forward_marginal(t).score(x)


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Both sides of the verification identity for one control, by simulation.

    Attributes:
        num_steps: Steps, equal in time.
        num_paths: Paths.
        cost: J(u), nats.
        value_plus_gap: E V(X_0, 0) + 1/2 E int |u - u*|^2, on the same paths.
        gap: 1/2 E int |u - u*|^2 alone.
        standard_error: Of cost - value_plus_gap.
        bias: Mean of the same difference with -int u* . dW taken off every path: what the step size leaves.
        bias_standard_error: Of bias.
        terminal: The final states, (num_paths, d).
    """

    num_steps: int
    num_paths: int
    cost: float
    value_plus_gap: float
    gap: float
    standard_error: float
    bias: float
    bias_standard_error: float
    terminal: Tensor

    @property
    def difference(self) -> float:
        """J(u) less the right-hand side; zero but for steps and paths."""
        return self.cost - self.value_plus_gap


def verify(
    problem: TimeReversal,
    control: Control,
    *,
    num_steps: int,
    num_paths: int,
    generator: torch.Generator,
    scheme: Scheme = "euler",
) -> Verification:
    """Simulates `control` from X_0 ~ p_T and returns both sides of the identity.

    `euler` is Euler-Maruyama with left-point integrals, the sampler of Song et al., with an error of order 1 in the
    step; `heun` averages the drift over the step and takes trapezoidal integrals, order 2. div mu does not depend on
    x and its integral is taken exactly.
    """
    sde, dt, heun = problem.sde, problem.sde.horizon / num_steps, scheme == "heun"
    times = torch.linspace(0, sde.horizon, num_steps + 1, dtype=torch.float64)
    x = problem.data.marginal(sde.scale(times[-1]), sde.std(times[-1])).sample(num_paths, generator)
    start_value = problem.value(x, times[0])
    cost, gap, martingale = (torch.zeros(num_paths, dtype=torch.float64) for _ in range(3))
    for t, next_t in zip(times[:-1], times[1:], strict=True):
        u, best = control(x, t), problem.optimal_control(x, t)
        noise = math.sqrt(dt) * torch.randn(x.shape, dtype=torch.float64, generator=generator)
        shock = problem.diffusion((t + next_t) / 2 if heun else t) * noise
        slope = problem.drift(x, t) + problem.diffusion(t) * u
        if heun:
            predicted = x + slope * dt + shock
            end = problem.drift(predicted, next_t) + problem.diffusion(next_t) * control(predicted, next_t)
            slope = 0.5 * (slope + end)
        x = x + slope * dt + shock
        end_u, end_best = (control(x, next_t), problem.optimal_control(x, next_t)) if heun else (u, best)
        cost += 0.25 * dt * (u.square() + end_u.square()).sum(1)
        gap += 0.25 * dt * ((u - best).square() + (end_u - end_best).square()).sum(1)
        martingale += (best * noise).sum(1)
    cost += problem.data.dim * sde.scale(times[-1]).log() - problem.data.log_prob(x)
    difference = cost - start_value - gap
    residual = difference + martingale
    return Verification(
        num_steps=num_steps,
        num_paths=num_paths,
        cost=float(cost.mean()),
        value_plus_gap=float((start_value + gap).mean()),
        gap=float(gap.mean()),
        standard_error=float(difference.std() / math.sqrt(num_paths)),
        bias=float(residual.mean()),
        bias_standard_error=float(residual.std() / math.sqrt(num_paths)),
        terminal=x,
    )


def perturbed_controls(problem: TimeReversal) -> dict[str, Control]:
    """u* and three controls that miss it: by 20%, by a constant, and by a wave in x and t."""
    best = problem.optimal_control
    return {
        "u*": best,
        "1.2 u*": lambda x, t: 1.2 * best(x, t),
        "u* + 0.5": lambda x, t: best(x, t) + 0.5,
        "u* + sin(2 x + 3 t)": lambda x, t: best(x, t) + torch.sin(2 * x + 3 * t),
    }
