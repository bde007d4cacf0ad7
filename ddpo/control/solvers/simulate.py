"""Paths of a diffusion under a policy, and the value that the policy earns on them.

    dX = f(X, a) dt + Sigma(X, a) dW,     a = alpha(X),     over steps of dt

    euler        X + f dt + Sigma dW                                    weak order 1 (Kloeden and Platen 1992)
    heun         X + (f + f') dt / 2 + Sigma dW, f' at the Euler step   weak order 2 where Sigma is constant, else 1
    log_euler    X exp((f/X - s/2) dt + Sigma dW / X), s_i = sum_j (Sigma_ij / X_i)^2
                                                                        exact for positive states whose f/X and Sigma/X
                                                                        stay constant over the step

Rewards are integrated as e^(-rho t) r by the trapezoidal rule, except under `euler`, where the left end of each step
counts, so that both parts of the textbook scheme have order 1.

    value = closed_loop_value(problem, problem.optimal_action, x, dt=0.05, generator=torch.Generator().manual_seed(0))
    value.mean, value.standard_error

B is the batch, K the number of steps, n the state's and m the action's dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ddpo.control.problems.problem import ControlProblem

Scheme = Literal["euler", "heun", "log_euler"]
Policy = Callable[[Tensor], Tensor]
"""Actions (B, m) of states (B, n)."""


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Paths under a policy, without a graph.

    Attributes:
        times: (K + 1,).
        states: (K + 1, B, n).
        actions: (K + 1, B, m).
        rewards: r at each time, per unit of time, (K + 1, B).
        cumulative: The discounted reward earned up to each time, (K + 1, B).
    """

    times: Tensor
    states: Tensor
    actions: Tensor
    rewards: Tensor
    cumulative: Tensor


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A Monte Carlo mean.

    Attributes:
        mean: The mean.
        standard_error: Of the mean, infinite where the paths diverged.
    """

    mean: float
    standard_error: float


def step(
    problem: ControlProblem,
    policy: Policy,
    x: Tensor,
    a: Tensor,
    noise: Tensor,
    *,
    dt: float,
    t: float = 0.0,
    scheme: Scheme = "heun",
) -> Tensor:
    """The states (B, n) one step after x (B, n), where a = policy(x), given standard normal noise (B, w)."""
    drift, sigma = problem.drift(x, a, t), problem.diffusion(x, a, t)
    push = (sigma @ noise[:, :, None]).squeeze(-1) * dt**0.5
    if scheme == "log_euler":
        spread = (sigma / x[:, :, None]).square().sum(-1)
        return x * torch.exp((drift / x - 0.5 * spread) * dt + push / x)
    predicted = x + drift * dt + push
    if scheme == "euler":
        return predicted
    later = problem.drift(predicted, policy(predicted), t + dt)
    return x + 0.5 * (drift + later) * dt + push


def simulate(
    problem: ControlProblem,
    policy: Policy,
    x: Tensor,
    *,
    dt: float,
    num_steps: int,
    generator: torch.Generator,
    scheme: Scheme = "heun",
    antithetic: bool = False,
) -> Paths:
    """Paths from states (B, n).

    Args:
        problem: The diffusion.
        policy: Actions of states; autonomous.
        x: Where the paths start, (B, n), positive under `log_euler`.
        dt: Step, positive, in units of time.
        num_steps: K, at least 1.
        generator: Source of the noise.
        scheme: See the module's docstring.
        antithetic: The second half of the batch takes the first half's noise with the opposite sign.

    Raises:
        ValueError: dt, num_steps or the scheme is out of range, states are not positive under `log_euler`, or the
            batch is odd and antithetic.
    """
    _check(x, dt=dt, num_steps=num_steps, scheme=scheme, antithetic=antithetic)
    half = x.shape[0] // 2 if antithetic else x.shape[0]
    states, actions, rewards = [], [], []
    with torch.no_grad():
        for k in range(num_steps + 1):
            a = policy(x)
            states.append(x)
            actions.append(a)
            rewards.append(problem.reward(x, a, k * dt))
            if k < num_steps:
                shape = (half, problem.noise_dim)
                noise = torch.randn(shape, generator=generator, dtype=x.dtype, device=x.device)
                noise = torch.cat([noise, -noise]) if antithetic else noise
                x = step(problem, policy, x, a, noise, dt=dt, t=k * dt, scheme=scheme)
    times = dt * torch.arange(num_steps + 1, dtype=x.dtype, device=x.device)
    earned = torch.stack(rewards)
    return Paths(
        times=times,
        states=torch.stack(states),
        actions=torch.stack(actions),
        rewards=earned,
        cumulative=integrate(earned, times, problem.discount, scheme=scheme),
    )


def integrate(rates: Tensor, times: Tensor, discount: float, *, scheme: Scheme = "heun") -> Tensor:
    """The integral of e^(-rho t) times `rates` (K + 1, B) up to each of the times (K + 1,), (K + 1, B)."""
    rates = rates * torch.exp(-discount * times)[:, None]
    dt = times.diff()[:, None]
    pieces = rates[:-1] * dt if scheme == "euler" else 0.5 * (rates[:-1] + rates[1:]) * dt
    return torch.cat([torch.zeros_like(rates[:1]), pieces.cumsum(0)])


def closed_loop_returns(
    problem: ControlProblem,
    policy: Policy,
    x: Tensor,
    *,
    dt: float,
    generator: torch.Generator,
    horizon: float | None = None,
    scheme: Scheme = "heun",
) -> Tensor:
    """What the policy earns on one path from each of the states x (B, n), (B,); -inf or NaN where a path diverges.

    What an infinite horizon earns after `horizon` is left out: a share e^(-rho horizon) where rewards stay bounded.

    Args:
        problem: The diffusion.
        policy: Actions of states.
        x: Where the paths start; repeat a state to average over its noise.
        dt: Step.
        generator: Source of the noise.
        horizon: Where to stop; the problem's own, or 8 / rho, unless given.
        scheme: See the module's docstring.
    """
    if horizon is None:
        horizon = problem.horizon if problem.horizon is not None else 8 / problem.discount
    num_steps = max(1, round(horizon / dt))
    paths = simulate(problem, policy, x, dt=dt, num_steps=num_steps, generator=generator, scheme=scheme)
    if problem.horizon is None:
        return paths.cumulative[-1]
    final = problem.terminal_reward(paths.states[-1])
    return paths.cumulative[-1] + torch.exp(-problem.discount * paths.times[-1]) * final


def closed_loop_value(
    problem: ControlProblem,
    policy: Policy,
    x: Tensor,
    *,
    dt: float,
    generator: torch.Generator,
    horizon: float | None = None,
    scheme: Scheme = "heun",
) -> Estimate:
    """The mean of `closed_loop_returns`, whose arguments it shares.

    No learned value enters it: this is what certifies a policy.

    Raises:
        ValueError: Fewer than 2 states, or as `simulate`.
    """
    return estimate(closed_loop_returns(problem, policy, x, dt=dt, generator=generator, horizon=horizon, scheme=scheme))


def estimate(samples: Tensor) -> Estimate:
    """Mean and standard error of samples (B,); -inf, with an infinite error, where one is not finite.

    Raises:
        ValueError: Fewer than 2 samples.
    """
    if len(samples) < 2:
        raise ValueError(f"a standard error needs at least 2 starting states, got {len(samples)}; repeat the state")
    samples = samples.double()
    if not bool(samples.isfinite().all()):
        return Estimate(mean=-float("inf"), standard_error=float("inf"))
    return Estimate(mean=float(samples.mean()), standard_error=float(samples.std()) / len(samples) ** 0.5)


def require_finite_value(
    problem: ControlProblem,
    policy: Policy,
    x: Tensor,
    *,
    generator: torch.Generator,
    dt: float = 0.05,
    scheme: Scheme = "heun",
) -> None:
    """Refuses a policy whose discounted reward does not decay, over 5 / rho units of time from states x (B, n).

    Raises:
        ValueError: It does not, so the policy has no finite value to evaluate.
    """
    num_steps = min(2000, max(20, round(5 / (problem.discount * dt))))
    paths = simulate(problem, policy, x, dt=dt, num_steps=num_steps, generator=generator, scheme=scheme)
    sizes = (paths.rewards.abs() * torch.exp(-problem.discount * paths.times)[:, None]).double().mean(1)
    early, late = float(sizes[: num_steps // 2].mean()), float(sizes[-num_steps // 10 :].mean())
    if not late < early:
        raise ValueError(
            f"the initial policy has no finite value: its discounted reward grows from {early:.3g} to {late:.3g} per "
            f"unit of time by t = {num_steps * dt:.4g}; pass a policy that stabilises the state, or begin with larger "
            f"discount rates than {problem.discount:.4g} (`discounts` of the configuration)"
        )


def _check(x: Tensor, *, dt: float, num_steps: int, scheme: Scheme, antithetic: bool) -> None:
    if not dt > 0 or num_steps < 1:
        raise ValueError(f"dt must be positive and num_steps at least 1, got {dt} and {num_steps}")
    if scheme not in ("euler", "heun", "log_euler"):
        raise ValueError(f"scheme must be 'euler', 'heun' or 'log_euler', got {scheme!r}")
    if scheme == "log_euler" and not bool((x > 0).all()):
        raise ValueError(f"log_euler needs positive states, got a minimum of {float(x.min()):.4g}; use 'heun'")
    if antithetic and x.shape[0] % 2:
        raise ValueError(f"antithetic noise needs an even number of states, got {x.shape[0]}")
