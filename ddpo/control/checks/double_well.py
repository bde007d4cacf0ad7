"""The double well's finite-difference value against its order, its HJB equation and simulated paths."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.problems.double_well import DoubleWell, DoubleWellReference, solve_double_well

_NUM_PATHS, _NUM_STEPS = 1000, 200
_EULER_BIAS = 3e-3


def _order() -> Iterator[Measurement]:
    problem, x = DoubleWell(), torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    coarse, middle, fine = (solve_double_well(problem, num_intervals=6 * k, num_steps=4 * k) for k in (25, 50, 100))
    for name, steps in (
        ("order of V", [reference.value(0.0, x) for reference in (coarse, middle, fine)]),
        ("order of u*", [reference.optimal_action(0.0, x) for reference in (coarse, middle, fine)]),
    ):
        ratio = (steps[0] - steps[1]).abs().max() / (steps[1] - steps[2]).abs().max()
        order = ratio.log2().item()
        yield Measurement(name=name, exact=2.0, obtained=order, error=abs(order - 2), tolerance=0.15)


def _hjb() -> Iterator[Measurement]:
    """Residual dV/dt - U' V' + sigma^2 V'' / 2 + sigma^2 V'^2 / (2 alpha), by central differences."""
    problem, step, moment = DoubleWell(), 0.005, 0.001
    reference = solve_double_well(problem)
    x, worst = torch.linspace(-1.8, 1.8, 37, dtype=torch.float64)[:, None], 0.0
    for t in (0.1, 0.5, 0.9):
        value, below, above = (reference.value(t, x + shift) for shift in (0.0, -step, step))
        slope, curvature = (above - below) / (2 * step), (above - 2 * value + below) / step**2
        change = (reference.value(t + moment, x) - reference.value(t - moment, x)) / (2 * moment)
        free = problem.drift(x, torch.zeros_like(x))[:, 0]
        gain = free * slope + 0.5 * problem.noise**2 * (curvature + slope**2 / problem.temperature)
        worst = max(worst, (change + gain).abs().max().item())
    yield Measurement(name="largest HJB residual", exact=0.0, obtained=worst, error=worst, tolerance=1e-3)


def _feynman_kac() -> Iterator[Measurement]:
    """Phi = E_u exp(g / alpha - int u dW - int u^2 dt / 2) for every u, without variance if u = u* (Girsanov)."""
    problem = DoubleWell()
    reference = solve_double_well(problem, num_intervals=300, num_steps=200)
    for start in (-1.0, 0.3):
        x0 = torch.full((_NUM_PATHS, 1), start, dtype=torch.float64)
        weights = _log_weights(problem, reference, x0).exp()
        obtained = problem.temperature * weights.mean().log().item()
        exact, spread = reference.value(0.0, x0[:1]).item(), (weights.std() / weights.mean()).item()
        yield Measurement(
            name=f"V(0, {start}) by {_NUM_PATHS} steered paths",
            exact=exact,
            obtained=obtained,
            error=abs(obtained - exact),
            tolerance=4 * problem.temperature * spread / _NUM_PATHS**0.5 + _EULER_BIAS,
        )
        yield Measurement(
            name="relative spread of the paths' weights", exact=0.0, obtained=spread, error=spread, tolerance=0.3
        )


def _log_weights(problem: DoubleWell, reference: DoubleWellReference, x: Tensor) -> Tensor:
    """G / alpha less the log likelihood ratio to free paths, (B,), of Euler's paths under u*."""
    rng, dt = torch.Generator().manual_seed(0), float(problem.horizon or 0) / _NUM_STEPS
    ratio = x.new_zeros(x.shape[0])
    for step in range(_NUM_STEPS):
        noise = dt**0.5 * torch.randn(x.shape, dtype=x.dtype, generator=rng)
        u = reference.optimal_action(step * dt, x)
        ratio = ratio + (u * noise + 0.5 * u**2 * dt).squeeze(-1)
        x = x + problem.drift(x, u) * dt + problem.noise * noise
    return problem.terminal_reward(x) / problem.temperature - ratio


CHECKS: tuple[Check, ...] = (
    Check(
        name="order",
        group="double_well",
        claim="The grid's error falls with the square of its steps.",
        level="fast",
        run=_order,
    ),
    Check(
        name="HJB",
        group="double_well",
        claim="alpha log phi solves the nonlinear HJB equation.",
        level="fast",
        run=_hjb,
    ),
    Check(
        name="Feynman-Kac",
        group="double_well",
        claim="Paths weighted by Girsanov's ratio give the value, and under u* all have the same weight.",
        level="fast",
        run=_feynman_kac,
    ),
)
