"""The generator of a diffusion and the residuals of its equations against closed forms."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.problems.lqr import StochasticLQR
from ddpo.control.problems.merton import Merton
from ddpo.control.problems.problem import ControlProblem
from ddpo.control.solvers.generator import deterministic_hjb_residual, generator, hjb_residual
from ddpo.control.solvers.improvement import maximise_hamiltonian
from ddpo.control.solvers.simulate import closed_loop_value

_SECOND_ROOT = -0.37597507691408064
"""The negative root of the scalar regulator's Riccati equation, 10 P^2 + 1.1 P - 1 = 0."""


class _Steered(ControlProblem):
    """dx = a dt, r = -a^2 / 2 and g = -x^2 / 2 at T = 1, so V = -x^2 / (2 (2 - t))."""

    state_dim, action_dim, noise_dim, discount, horizon = 1, 1, 1, 0.0, 1.0

    def drift(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        return a

    def diffusion(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        return torch.zeros_like(x)[:, :, None]

    def reward(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        return -0.5 * a.squeeze(1) ** 2


def _cubic_problem() -> tuple[StochasticLQR, Tensor, Tensor, Tensor]:
    """A regulator of four states, and L^a of V = sum x^3 at some states and actions."""
    rng = torch.Generator().manual_seed(0)
    a_matrix, b, d = (torch.randn(4, k, generator=rng, dtype=torch.float64).numpy() for k in (4, 2, 3))
    problem = StochasticLQR(a_matrix, b, torch.eye(4).numpy(), torch.eye(2).numpy(), d, discount=0.1)
    x = torch.randn(16, 4, generator=rng, dtype=torch.float64)
    a = torch.randn(16, 2, generator=rng, dtype=torch.float64)
    curvature = 3 * x * (problem.D @ problem.D.T).diagonal()
    return problem, x, a, (3 * x**2 * problem.drift(x, a)).sum(1) + curvature.sum(1)


def _cubic(x: Tensor) -> Tensor:
    return (x**3).sum(1)


def _newton(problem: ControlProblem, x: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
    start = x.new_zeros(len(x), problem.action_dim)
    if isinstance(problem, Merton):
        start = x.new_tensor([0.3, 0.03]).expand(len(x), 2)
    return maximise_hamiltonian(problem, x, gradient, hessian, start)


def _generator() -> Iterator[Measurement]:
    problem, x, a, exact = _cubic_problem()
    error = float((generator(_cubic, problem, x, a).detach() - exact).abs().max())
    yield Measurement(name="L V of a cubic, d = 4", exact=0.0, obtained=error, error=error, tolerance=1e-11)
    rng = torch.Generator().manual_seed(1)
    x, a, exact = x[:1], a[:1], exact[:1]
    probes = generator(
        _cubic,
        problem,
        x.expand(5000, -1),
        a.expand(5000, -1),
        hessian="hutchinson",
        generator=rng,
    ).detach()
    z = abs(float(probes.mean() - exact) / (float(probes.std()) / 5000**0.5))
    yield Measurement(
        name="Hutchinson's mean, z-score", exact=float(exact), obtained=float(probes.mean()), error=z, tolerance=4.0
    )


def _residuals() -> Iterator[Measurement]:
    regulator, merton, steered = StochasticLQR.example(), Merton(), _Steered()
    x = torch.linspace(0.3, 3, 16, dtype=torch.float64)[:, None]
    for name, problem, value in (("regulator", regulator, regulator.value), ("Merton", merton, merton.value)):
        residual = hjb_residual(value, problem, x, lambda *at, problem=problem: _newton(problem, *at)) / value(x)
        error = float(residual.abs().max())
        yield Measurement(
            name=f"residual / V of the exact value, {name}", exact=0.0, obtained=error, error=error, tolerance=1e-11
        )
    times = torch.linspace(0, 0.9, 16, dtype=torch.float64)
    residual = deterministic_hjb_residual(
        lambda y, t: -0.5 * y[:, 0] ** 2 / (2 - t), steered, x, times, lambda *at: _newton(steered, *at)
    )
    error = float(residual.abs().max())
    yield Measurement(name="residual without noise", exact=0.0, obtained=error, error=error, tolerance=1e-12)


def _second_root() -> Iterator[Measurement]:
    problem = StochasticLQR.example()
    x = torch.linspace(-2, 2, 64, dtype=torch.float64)[:, None]

    def value(y: Tensor) -> Tensor:
        return -0.5 * _SECOND_ROOT * y[:, 0] ** 2 - 0.45 * _SECOND_ROOT

    error = float(hjb_residual(value, problem, x, lambda *at: _newton(problem, *at)).abs().max())
    yield Measurement(name="HJB residual of the second root", exact=0.0, obtained=error, error=error, tolerance=1e-12)
    claimed = float(value(x).mean())
    achieved = closed_loop_value(
        problem,
        lambda y: -10 * _SECOND_ROOT * y,
        x,
        dt=0.05,
        horizon=5.0,
        generator=torch.Generator().manual_seed(0),
    )
    missed = max(0.0, achieved.mean + 1e6)
    yield Measurement(
        name=f"what its policy earns, where it claims {claimed:.3f}",
        exact="< -1e6",
        obtained=achieved.mean,
        error=missed,
        tolerance=0.0,
    )


CHECKS: tuple[Check, ...] = (
    Check(
        name="generator",
        group="hjb",
        claim="The generator of a cubic is its closed form, and Hutchinson's estimate has that mean.",
        level="fast",
        run=_generator,
    ),
    Check(
        name="residuals",
        group="hjb",
        claim="Exact values have no residual in their HJB equations, with the maximum found by Newton's method.",
        level="fast",
        run=_residuals,
    ),
    Check(
        name="residual is no certificate",
        group="hjb",
        claim="A value on the wrong Riccati root has no residual either, and its policy's cost diverges.",
        level="fast",
        run=_second_root,
    ),
)
