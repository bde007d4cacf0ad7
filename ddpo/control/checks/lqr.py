"""The linear-quadratic regulator against its quadratic formula, its HJB equation, Lyapunov's equation and the chain."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.problems.lqr import StochasticLQR, discretised_gain, richardson

_ALPHA, _BETA, _Q, _R, _SIGMA, _RHO = -0.5, 1.0, 1.0, 0.1, 0.3, 0.1
"""The scalar example: drift, push, state cost, action cost, noise, discount rate."""


def _roots() -> tuple[float, float]:
    """Both roots of beta^2 P^2 / r + (rho - 2 alpha) P - q = 0, the smaller first."""
    linear, square = _RHO - 2 * _ALPHA, _BETA**2 / _R
    spread = (linear**2 + 4 * square * _Q) ** 0.5
    return (-linear - spread) / (2 * square), (-linear + spread) / (2 * square)


def _matrix_problem() -> StochasticLQR:
    """Four states, two actions and three noises, drawn once."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(4, 4))
    return StochasticLQR(
        rng.normal(size=(4, 4)), rng.normal(size=(4, 2)), q @ q.T, np.eye(2), rng.normal(size=(4, 3)), discount=0.3
    )


def _right_hand_side(problem: StochasticLQR, x: Tensor, a: Tensor) -> Tensor:
    """R + grad V . f + tr(D D' V'') / 2, (B,), derivatives by autograd."""

    def value(state: Tensor) -> Tensor:
        return problem.value(state[None])[0]

    gradient, hessian = torch.func.vmap(torch.func.grad(value))(x), torch.func.vmap(torch.func.hessian(value))(x)
    sigma = problem.diffusion(x, a)
    trace = (sigma @ sigma.mT * hessian).sum((-2, -1))
    return problem.reward(x, a) + (gradient * problem.drift(x, a)).sum(-1) + 0.5 * trace


def _riccati() -> Iterator[Measurement]:
    solution, P = StochasticLQR.example().solution(), _roots()[1]
    for name, exact, obtained in (
        ("P", P, solution.P.item()),
        ("K", _BETA * P / _R, solution.K.item()),
        ("c", _SIGMA**2 * P / (2 * _RHO), solution.c),
    ):
        yield Measurement(name=name, exact=exact, obtained=obtained, error=abs(obtained - exact), tolerance=1e-12)


def _second_root() -> Iterator[Measurement]:
    second = _roots()[0]
    residual = abs(_Q + (2 * _ALPHA - _RHO) * second - (_BETA * second) ** 2 / _R)
    yield Measurement(
        name=f"HJB residual of the second root {second:.9f}",
        exact=0.0,
        obtained=residual,
        error=residual,
        tolerance=1e-12,
    )
    solution = StochasticLQR.example().solution()
    for name, gain, sign in (
        ("growth rate under the gain returned", solution.K.item(), 1),
        ("growth rate under the second root's", _BETA * second / _R, -1),
    ):
        growth = _ALPHA - _BETA * gain - _RHO / 2
        wrong = max(sign * growth, 0.0)
        yield Measurement(name=name, exact="< 0" if sign > 0 else "> 0", obtained=growth, error=wrong, tolerance=0.0)


def _hjb() -> Iterator[Measurement]:
    problem, rng = _matrix_problem(), torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, dtype=torch.float64, generator=rng)
    best = problem.optimal_action(x)
    residual = (problem.discount * problem.value(x) - _right_hand_side(problem, x, best)) / problem.value(x)
    error = residual.abs().max().item()
    yield Measurement(name="HJB residual / V, d = 4", exact=0.0, obtained=error, error=error, tolerance=1e-10)

    step = torch.randn(best.shape, dtype=torch.float64, generator=rng)
    loss = problem.discount * problem.value(x) - _right_hand_side(problem, x, best + step)
    error = (loss - 0.5 * ((step @ problem.R) * step).sum(-1)).abs().max().item() / loss.max().item()
    yield Measurement(
        name="loss of another action, |a - a*|^2_R / 2", exact=0.0, obtained=error, error=error, tolerance=1e-10
    )

    P, _ = problem.policy_value(problem.solution().K)
    error = float(np.abs(P / problem.solution().P - 1).max())
    yield Measurement(name="Lyapunov against Riccati", exact=0.0, obtained=error, error=error, tolerance=1e-9)


def _chain() -> Iterator[Measurement]:
    exact = _BETA * _roots()[1] / _R
    gains = {dt: discretised_gain(_ALPHA, _BETA, _Q, _R, _SIGMA, _RHO, dt) for dt in (0.1, 0.02, 0.01)}
    for dt in (0.1, 0.01):
        bias, fixed_point = gains[dt].item() / exact - 1, _chain_gain(dt) / exact - 1
        yield Measurement(
            name=f"gain bias at dt {dt}",
            exact=fixed_point,
            obtained=bias,
            error=abs(bias - fixed_point),
            tolerance=1e-9,
        )
    bias = richardson(gains[0.01], gains[0.02]).item() / exact - 1
    yield Measurement(name="after Richardson, .01 and .02", exact=0.0, obtained=bias, error=abs(bias), tolerance=5e-4)


def _chain_gain(dt: float) -> float:
    """The scalar chain's gain by iterating its Bellman equation to a fixed point."""
    gamma, step, push, P = float(np.exp(-_RHO * dt)), 1 + _ALPHA * dt, _BETA * dt, 0.0
    gain = 0.0
    for _ in range(int(60 / dt)):
        gain = gamma * push * P * step / (_R * dt + gamma * push**2 * P)
        P = _Q * dt + gain**2 * _R * dt + gamma * (step - push * gain) ** 2 * P
    return gain


CHECKS: tuple[Check, ...] = (
    Check(
        name="Riccati",
        group="lqr",
        claim="The scalar solution is the positive root of its quadratic.",
        level="fast",
        run=_riccati,
    ),
    Check(
        name="second root",
        group="lqr",
        claim="The other root solves the HJB equation as well, and is told apart by stability.",
        level="fast",
        run=_second_root,
    ),
    Check(
        name="HJB",
        group="lqr",
        claim="In four dimensions V* solves the HJB equation, a* attains its maximum, and Lyapunov's equation agrees.",
        level="fast",
        run=_hjb,
    ),
    Check(
        name="chain",
        group="lqr",
        claim="The gain of the Euler chain has the bias that dynamic programming on it gives.",
        level="fast",
        run=_chain,
    ),
)
