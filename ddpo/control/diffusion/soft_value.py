"""KL-regularised control: the soft value by Feynman-Kac Monte Carlo, against the exact linear-Gaussian one.

    dX = (b(X, t) + sigma u) dt + sigma dW,     maximise E [ r(X_T) - alpha / 2 int_t^T |u|^2 ds ]

The cost-to-go v = min E [alpha / 2 int |u|^2 - r] solves

    dv/dt + b . grad v - |sigma^T grad v|^2 / (2 alpha) + 1/2 tr(sigma sigma^T hess v) = 0,    v(x, T) = -r(x)

and phi = exp(-v / alpha) turns it into the linear backward equation, so that (Fleming and Soner 2006, chapter VI;
Kappen 2005), with X the *uncontrolled* process,

    v(x, t) = -alpha log E [exp(r(X_T) / alpha) | X_t = x],      u*(x, t) = -sigma^T grad v / alpha

The running cost is (alpha / 2) |u|^2, alpha times the path KL; with |u|^2 / (2 alpha) all three lines would change,
and at alpha = 1 nobody would notice. v is minus the soft value of reinforcement learning.

The paths use the Heun drift, of weak order 2 for this additive noise. B states, M paths for each, n dimensions.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpo.control.diffusion.chain import Quadratic

Field = Callable[[Tensor, float], Tensor]
"""b(x, t), (B, n), of states (B, n) and a time."""


@dataclass(frozen=True, kw_only=True)
class SoftValue:
    """A Monte Carlo estimate of v and its reliability.

    Attributes:
        value: v, (B,), in the unit of the reward.
        standard_error: Of value, (B,): alpha * std(w) / (mean(w) sqrt(M)) with w = exp(r / alpha) (delta method). The
            estimate is biased upwards by about standard_error^2 / (2 alpha).
        effective_sample_size: (sum w)^2 / sum w^2, (B,), in [1, M].
        control: u*, (B, w), or None where it was not asked for.
        control_standard_error: (B, w), or None.
        min_effective_sample_size: Below it the estimate and its standard error are not to be trusted.
    """

    value: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor
    control: Tensor | None
    control_standard_error: Tensor | None
    min_effective_sample_size: float

    @property
    def reliable(self) -> Tensor:
        """Whether enough paths carry the average, (B,) bool."""
        return self.effective_sample_size >= self.min_effective_sample_size


def simulate(
    drift: Field, sigma: Tensor, x: Tensor, *, start: float, horizon: float, num_steps: int, generator: torch.Generator
) -> Tensor:
    """X_T, (B, n), of dX = b dt + sigma dW from (start, x), differentiable in x; Heun's drift, weak order 2."""
    dt = (horizon - start) / num_steps
    for k in range(num_steps):
        t = start + k * dt
        shock = torch.randn(x.shape[0], sigma.shape[1], dtype=x.dtype, generator=generator) @ sigma.T * math.sqrt(dt)
        slope = drift(x, t)
        predicted = x + dt * slope + shock
        x = x + 0.5 * dt * (slope + drift(predicted, t + dt)) + shock
    return x


def soft_value(
    x: Tensor,
    drift: Field,
    sigma: Tensor,
    reward: Callable[[Tensor], Tensor],
    *,
    alpha: float,
    horizon: float,
    num_steps: int,
    num_paths: int,
    generator: torch.Generator,
    start: float = 0.0,
    with_control: bool = False,
    min_effective_sample_size: float = 100.0,
) -> SoftValue:
    """Estimates v(x, start), and u* by differentiating the paths.

    Args:
        x: States, (B, n).
        drift: b; differentiable where the control is wanted.
        sigma: (n, w).
        reward: r, (B,) of final states (B, n); differentiable where the control is wanted.
        alpha: Weight of the KL, > 0.
        horizon: T > start.
        num_steps: Steps from start to T.
        num_paths: M, per state.
        generator: Of the Brownian increments.
        start: t.
        with_control: Also estimate u* = sigma^T sum_i w_i grad_x r(X_T^i) / (alpha sum_i w_i), the exact gradient of
            the estimate of v.
        min_effective_sample_size: A RuntimeWarning is given, and `reliable` is False, below it.

    Raises:
        ValueError: alpha is not positive or the horizon does not lie after the start.
    """
    if alpha <= 0 or horizon <= start:
        raise ValueError(f"alpha {alpha}, start {start}, horizon {horizon}: give alpha > 0 and horizon > start")
    batch, dim = x.shape
    starts = x.detach().repeat_interleave(num_paths, 0).requires_grad_(with_control)
    with torch.set_grad_enabled(with_control):
        final = simulate(drift, sigma, starts, start=start, horizon=horizon, num_steps=num_steps, generator=generator)
        rewards = reward(final)
    log_weights = (rewards.detach() / alpha).reshape(batch, num_paths)
    weights = log_weights.softmax(1)
    value = -alpha * (log_weights.logsumexp(1) - math.log(num_paths))
    size = 1 / weights.square().sum(1)
    standard_error = alpha * ((1 / size - 1 / num_paths).clamp_min(0) * num_paths / max(num_paths - 1, 1)).sqrt()
    control = control_error = None
    if with_control:
        slopes = torch.autograd.grad(rewards.sum(), starts)[0] @ sigma / alpha
        slopes = slopes.reshape(batch, num_paths, sigma.shape[1])
        control = (weights[..., None] * slopes).sum(1)
        control_error = (weights[..., None] * (slopes - control[:, None])).square().sum(1).sqrt()
    if float(size.min()) < min_effective_sample_size:
        warnings.warn(
            f"effective sample size {float(size.min()):.1f} of {num_paths} paths: the standard error is not "
            "to be trusted; raise num_paths or alpha, or start nearer to the horizon",
            RuntimeWarning,
            stacklevel=2,
        )
    return SoftValue(
        value=value,
        standard_error=standard_error,
        effective_sample_size=size,
        control=control,
        control_standard_error=control_error,
        min_effective_sample_size=min_effective_sample_size,
    )


@dataclass(frozen=True, kw_only=True)
class ExactSoftValue:
    """An Ornstein-Uhlenbeck process dX = (A X + c + sigma u) dt + sigma dW with a quadratic terminal reward, exact.

    X_T given X_t = x is N(m, C), and with S = P / alpha, s = q / alpha of the reward -1/2 x'Px + q'x + c

        log E exp(r / alpha) = c / alpha - m'Sm / 2 + s'm + b'(I + C S)^(-1) C b / 2 - log det(I + C S) / 2

    where b = s - S m.

    Attributes:
        A: (n, n).
        offset: c, (n,).
        sigma: (n, w).
        reward: r; a linear reward has P = 0.
        alpha: Weight of the KL.
        horizon: T.
    """

    A: Tensor
    offset: Tensor
    sigma: Tensor
    reward: Quadratic
    alpha: float
    horizon: float

    def drift(self, x: Tensor, t: float = 0.0) -> Tensor:
        """A x + c, (B, n)."""
        return x @ self.A.T + self.offset

    def transition(self, time_left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """F (n, n), g (n,), C (n, n) with X_T ~ N(F x + g, C); differentiable in the time (Van Loan 1978)."""
        n = self.A.shape[0]
        zero = self.A.new_zeros(n, n)
        pair = torch.cat([torch.cat([-self.A, self.sigma @ self.sigma.T], 1), torch.cat([zero, self.A.T], 1)], 0)
        exponential = torch.linalg.matrix_exp(pair * time_left)
        F = exponential[n:, n:].T
        affine = torch.cat([torch.cat([self.A, self.offset[:, None]], 1), self.A.new_zeros(1, n + 1)], 0)
        return F, torch.linalg.matrix_exp(affine * time_left)[:n, n], F @ exponential[:n, n:]

    def value(self, x: Tensor, t: Tensor) -> Tensor:
        """v(x, t), (B,), of states (B, n) and a scalar time; differentiable in both.

        Raises:
            ValueError: The reward grows so fast that E exp(r / alpha) is infinite.
        """
        F, g, C = self.transition(self.horizon - t)
        S, s = self.reward.P / self.alpha, self.reward.q / self.alpha
        inner = torch.eye(C.shape[0], dtype=C.dtype) + C @ S
        if float(torch.linalg.eigvals(inner.detach()).real.min()) <= 0:
            raise ValueError(f"E exp(r / alpha) is infinite at alpha {self.alpha}; raise alpha or shorten the horizon")
        mean = x @ F.T + g
        b = s - mean @ S
        spread = torch.linalg.solve(inner, C)
        exponent = 0.5 * (b @ spread * b).sum(1) - 0.5 * torch.logdet(inner)
        return -self.reward(mean) - self.alpha * exponent

    def control(self, x: Tensor, t: Tensor) -> Tensor:
        """u*(x, t) = -sigma^T grad v / alpha, (B, w)."""
        leaf = x.detach().requires_grad_()
        return -torch.autograd.grad(self.value(leaf, t).sum(), leaf)[0] @ self.sigma / self.alpha


def hjb_residual(
    value: Callable[[Tensor, Tensor], Tensor], drift: Field, sigma: Tensor, *, alpha: float, x: Tensor, t: float
) -> Tensor:
    """The left-hand side of the HJB equation at states (B, n), (B,), by autograd with the exact Hessian.

    Zero where `value` is the cost-to-go v; `value` must treat the rows of x one by one.
    """
    leaf, time = x.detach().requires_grad_(), torch.tensor(t, dtype=x.dtype, requires_grad=True)
    times = time.expand(x.shape[0])
    per_row = torch.cat([value(leaf[i : i + 1], times[i]) for i in range(x.shape[0])])
    time_slope = torch.stack([torch.autograd.grad(v, time, retain_graph=True)[0] for v in per_row])
    gradient = torch.autograd.grad(per_row.sum(), leaf, create_graph=True)[0]
    rows = [torch.autograd.grad(gradient[:, i].sum(), leaf, retain_graph=True)[0] for i in range(x.shape[1])]
    curvature = (torch.stack(rows, 1) * (sigma @ sigma.T)).sum((1, 2))
    steer = (gradient @ sigma).square().sum(1) / (2 * alpha)
    return (time_slope + (drift(leaf, t) * gradient).sum(1) - steer + 0.5 * curvature).detach()
