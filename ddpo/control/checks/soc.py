"""Problems of the literature: SOC matching's four, solved by adjoint matching, and DeepBSDE's equation."""

from collections.abc import Iterator

import torch

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.problems.soc_problems import (
    SOCProblem,
    control_error,
    double_well,
    linear_ou,
    quadratic_ou_easy,
    quadratic_ou_hard,
)
from ddpo.control.solvers.adjoint_matching import AffineControl, SeparableControl, adjoint_matching, adjoint_regression
from ddpo.control.solvers.deep_bsde import DeepBSDEProblem, RadialControl, control_cost, exact_value, monte_carlo_value

_DEEP_BSDE = 4.590161724604863


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _solved(name: str, problem: SOCProblem, tolerance: float) -> Measurement:
    control = AffineControl(problem.start.shape[0])
    adjoint_regression(problem, control, generator=_seeded(1), num_iterations=10, num_paths=128)
    error = control_error(problem, control, num_paths=200, generator=_seeded(2)).relative
    return Measurement(
        name=f"E|u - u*|^2 / E|u*|^2, {name}", exact=0.0, obtained=error, error=error, tolerance=tolerance
    )


def _easy() -> Iterator[Measurement]:
    yield _solved("quadratic OU easy", quadratic_ou_easy(_seeded(0)), 2e-3)
    yield _solved("linear OU", linear_ou(_seeded(0)), 2e-4)


def _hard() -> Iterator[Measurement]:
    yield _solved("quadratic OU hard", quadratic_ou_hard(_seeded(0)), 1e-2)


def _wells() -> Iterator[Measurement]:
    problem, control = double_well(), SeparableControl(10)
    adjoint_regression(problem, control, generator=_seeded(1), num_iterations=16, num_paths=64)
    error = control_error(problem, control, num_paths=100, generator=_seeded(2)).relative
    yield Measurement(name="E|u - u*|^2 / E|u*|^2, double well", exact=0.0, obtained=error, error=error, tolerance=0.25)


def _equation() -> Iterator[Measurement]:
    exact = exact_value()
    yield Measurement(
        name="u(0, 0) by quadrature",
        exact=_DEEP_BSDE,
        obtained=exact,
        error=abs(exact / _DEEP_BSDE - 1),
        tolerance=1e-10,
    )
    estimate = monte_carlo_value(num_paths=20_000, generator=_seeded(0))
    value, sigma = float(estimate.value), float(estimate.standard_error)
    yield Measurement(
        name=f"u(0, 0) by Feynman-Kac (standard error {sigma:.1e})",
        exact=_DEEP_BSDE,
        obtained=value,
        error=abs(value - _DEEP_BSDE),
        tolerance=4 * sigma,
    )


def _learned() -> Iterator[Measurement]:
    problem, control = DeepBSDEProblem(), RadialControl(generator=_seeded(0))
    adjoint_matching(problem, control, generator=_seeded(1), num_iterations=300, learning_rate=2e-2)
    error = control_error(problem, control, num_paths=500, generator=_seeded(2)).relative
    yield Measurement(name="E|u - u*|^2 / E|u*|^2, d = 100", exact=0.0, obtained=error, error=error, tolerance=1e-2)
    cost, sigma = control_cost(problem, control, num_paths=2000, generator=_seeded(3), num_steps=80)
    yield Measurement(
        name=f"u(0, 0) as its cost (standard error {sigma:.1e})",
        exact=_DEEP_BSDE,
        obtained=cost,
        error=abs(cost / _DEEP_BSDE - 1),
        tolerance=1e-3,
    )


CHECKS: tuple[Check, ...] = (
    Check(
        name="adjoint matching",
        group="soc",
        claim="Adjoint matching reaches the optimal control of SOC matching's OU problems.",
        level="fast",
        run=_easy,
    ),
    Check(
        name="adjoint matching, hard",
        group="soc",
        claim="Adjoint matching reaches the optimum of the unstable quadratic problem, d = 20.",
        level="fast",
        run=_hard,
    ),
    Check(
        name="adjoint matching, wells",
        group="soc",
        claim="On the ten-dimensional double well adjoint matching takes away most of the error, not all of it.",
        level="slow",
        run=_wells,
    ),
    Check(
        name="DeepBSDE",
        group="soc",
        claim="The 100-dimensional HJB equation of DeepBSDE has the value 4.5902 at the origin.",
        level="fast",
        run=_equation,
    ),
    Check(
        name="DeepBSDE, learned",
        group="soc",
        claim="A control learned by adjoint matching solves the 100-dimensional equation.",
        level="full",
        run=_learned,
    ),
)
