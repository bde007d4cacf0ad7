"""The price of a control in nats: the KL divergence between path laws.

    P^u:  dX = (b(X, t) + sigma u(X, t)) dt + sigma dW          P:  the same with u = 0
    KL(P^u || P) = E^u int_0^T |u|^2 / 2 dt                     (Girsanov, whatever weight a cost gives it)

Three estimates on the same Euler-Maruyama paths: the integral; the sum of the KL divergences between the Gaussian
steps of both chains, which is what a diffusion policy's per-step KL adds up; and the mean log-likelihood ratio int u
. dW + int |u|^2 / 2, noisier and with the same mean. For an affine control of an Ornstein-Uhlenbeck process the exact
value is a moment ODE.

B paths, n states, w noises.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

Field = Callable[[Tensor, float], Tensor]
"""A function of states (B, n) and a time."""


@dataclass(frozen=True, kw_only=True)
class PathKL:
    """KL(P^u || P) in nats, three ways.

    Attributes:
        integral: E int |u|^2 / 2 dt.
        standard_error: Of integral.
        step_sum: E of the sum of per-step Gaussian KL divergences.
        log_ratio: Mean of log dP^u / dP along the paths of u.
        log_ratio_standard_error: Of log_ratio.
    """

    integral: float
    standard_error: float
    step_sum: float
    log_ratio: float
    log_ratio_standard_error: float


def path_kl(
    control: Field,
    drift: Field,
    sigma: Tensor,
    start: Tensor,
    *,
    horizon: float,
    num_steps: int,
    generator: torch.Generator,
) -> PathKL:
    """Estimates the path KL by simulating the controlled process.

    Args:
        control: u(x, t), (B, w).
        drift: b(x, t), (B, n).
        sigma: (n, w), of full row rank (each step's noise has a density).
        start: Initial states, (B, n); one path each.
        horizon: T > 0.
        num_steps: Euler-Maruyama steps.
        generator: Of the Brownian increments.
    """
    dt, x = horizon / num_steps, start
    step_cholesky = torch.linalg.cholesky(sigma @ sigma.T * dt)
    integral, step_sum, stochastic = (x.new_zeros(x.shape[0]) for _ in range(3))
    for k in range(num_steps):
        t = k * dt
        u, b = control(x, t), drift(x, t)
        noise = math.sqrt(dt) * torch.randn(u.shape, dtype=x.dtype, generator=generator)
        mean, reference = x + (b + u @ sigma.T) * dt, x + b * dt
        white = torch.linalg.solve_triangular(step_cholesky, (mean - reference).T, upper=False)
        integral += 0.5 * dt * u.square().sum(1)
        step_sum += 0.5 * white.square().sum(0)
        stochastic += (u * noise).sum(1)
        x = mean + noise @ sigma.T
    ratio, root = stochastic + integral, math.sqrt(x.shape[0])
    return PathKL(
        integral=float(integral.mean()),
        standard_error=float(integral.std() / root),
        step_sum=float(step_sum.mean()),
        log_ratio=float(ratio.mean()),
        log_ratio_standard_error=float(ratio.std() / root),
    )


def affine_path_kl(
    A: Tensor, sigma: Tensor, K: Tensor, k: Tensor, *, mean: Tensor, cov: Tensor, horizon: float
) -> float:
    """The exact KL(P^u || P), nats, of u = K x + k on dX = (A X + sigma u) dt + sigma dW, X_0 ~ N(mean, cov).

    The states stay Gaussian, with M = A + sigma K: m' = M m + sigma k, C' = M C + C M' + sigma sigma', and
    d KL / dt = (tr K C K' + |K m + k|^2) / 2; integrated to 1e-11 relative.

    Args:
        A: (n, n).
        sigma: (n, w).
        K: (w, n).
        k: (w,).
        mean: (n,).
        cov: (n, n); zeros for a fixed start.
        horizon: T.
    """
    closed, noise_cov = (A + sigma @ K).numpy(), (sigma @ sigma.T).numpy()
    push, gain, constant, n = (sigma @ k).numpy(), K.numpy(), k.numpy(), A.shape[0]

    def derivative(_t: float, state: np.ndarray) -> np.ndarray:
        m, C = state[:n], state[n : n + n * n].reshape(n, n)
        rate = 0.5 * (np.trace(gain @ C @ gain.T) + np.sum((gain @ m + constant) ** 2))
        return np.concatenate([closed @ m + push, (closed @ C + C @ closed.T + noise_cov).ravel(), [rate]])

    state = np.concatenate([mean.numpy(), cov.numpy().ravel(), [0.0]])
    return float(solve_ivp(derivative, (0, horizon), state, method="DOP853", rtol=1e-11, atol=1e-13).y[-1, -1])
