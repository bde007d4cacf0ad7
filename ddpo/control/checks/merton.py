"""Merton's problem against the printed constants, its HJB equation and exactly sampled wealth."""

from collections.abc import Iterator

import numpy as np
import torch
from scipy.integrate import quad
from torch import Tensor

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.problems.merton import Merton

_NUM_PATHS = 200_000


def _constants() -> Iterator[Measurement]:
    solution = Merton().solution()
    for name, exact, obtained in (
        ("risky share", 0.625, solution.risky_share),
        ("consumption rate", 0.0478125, solution.consumption_rate),
        ("growth M", 0.045625, solution.growth),
        ("scale A", 437.438591994532, solution.scale),
    ):
        error = abs(obtained / exact - 1)
        yield Measurement(name=name, exact=exact, obtained=obtained, error=error, tolerance=1e-12)


def _right_hand_side(problem: Merton, x: Tensor, a: Tensor) -> Tensor:
    """R + V' f + sigma^2 V'' / 2, (B,), derivatives by autograd."""

    def value(state: Tensor) -> Tensor:
        return problem.value(state[None])[0]

    gradient, hessian = torch.func.vmap(torch.func.grad(value))(x), torch.func.vmap(torch.func.hessian(value))(x)
    curvature = 0.5 * (problem.diffusion(x, a).square() * hessian).sum((-2, -1))
    return problem.reward(x, a) + (gradient * problem.drift(x, a)).sum(-1) + curvature


def _hjb() -> Iterator[Measurement]:
    problem = Merton()
    x = 0.2 + 5 * torch.rand(32, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    best, target = problem.optimal_action(x), problem.discount * problem.value(x)
    error = (_right_hand_side(problem, x, best) / target - 1).abs().max().item()
    yield Measurement(name="HJB residual / rho V", exact=0.0, obtained=error, error=error, tolerance=1e-12)

    moves = torch.tensor([[0.05, 0.0], [-0.05, 0.0], [0.0, 0.002], [0.0, -0.002]], dtype=torch.float64)
    gains = torch.cat([(_right_hand_side(problem, x, best + move) - target) / target.abs() for move in moves])
    error = max(gains.max().item(), 0.0)
    yield Measurement(
        name="best gain by another action", exact="< 0", obtained=gains.max().item(), error=error, tolerance=0.0
    )


def _constant_controls() -> Iterator[Measurement]:
    """An integral discounted at rate rho is 1/rho times the mean at an exponential time of that rate."""
    problem, power = Merton(), -1.0
    for share, rate in ((0.625, 0.0478125), (0.9, 0.06)):
        rng = np.random.default_rng(0)
        times = rng.exponential(1 / problem.discount, _NUM_PATHS)
        volatility = share * problem.volatility
        growth = problem.risk_free + share * (problem.mean_return - problem.risk_free) - rate - volatility**2 / 2
        wealth = np.exp(growth * times + volatility * np.sqrt(times) * rng.normal(size=_NUM_PATHS))
        utility = (rate * wealth) ** power / power / problem.discount
        exact, obtained = problem.policy_value(share, rate), float(utility.mean())
        z = abs(obtained - exact) / float(utility.std()) * _NUM_PATHS**0.5
        yield Measurement(
            name=f"V(1) at ({share}, {rate:.4g}), z-score", exact=exact, obtained=obtained, error=z, tolerance=4.0
        )


def _costs() -> Iterator[Measurement]:
    """What an error in the risky share costs of the value, which is why the controls are checked."""
    problem = Merton()
    best, rate = float(problem.value(torch.ones(1, 1, dtype=torch.float64))), problem.solution().consumption_rate
    for name, share, percent in (("10 % of it", 1.1 * 0.625, 0.33), (".1, 16 % of it", 0.725, 0.84)):
        lost = 100 * (problem.policy_value(share, rate) / best - 1)
        yield Measurement(name=f"pi too large by {name}: % of V", exact=percent, obtained=lost,
                          error=abs(lost - percent), tolerance=0.005)  # fmt: skip


def _logarithmic() -> Iterator[Measurement]:
    """Risk aversion 1: the HJB equation, the limit of power utility, and quadrature of the expected utility."""
    problem = Merton(risk_aversion=1.0)
    x = 0.2 + 5 * torch.rand(32, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    best = problem.optimal_action(x)
    off = _right_hand_side(problem, x, best) - problem.discount * problem.value(x)
    error = float(off.abs().max())
    yield Measurement(name="HJB residual", exact=0.0, obtained=error, error=error, tolerance=1e-12)
    near = Merton(risk_aversion=1.0 + 1e-7).solution()
    for name, exact, obtained in (
        ("risky share", near.risky_share, problem.solution().risky_share),
        ("consumption rate", near.consumption_rate, problem.solution().consumption_rate),
    ):
        error = abs(obtained / exact - 1)
        yield Measurement(name=f"{name}, limit gamma -> 1", exact=exact, obtained=obtained, error=error, tolerance=1e-6)
    share, rate = 0.9, 0.06
    drift = problem.risk_free + share * (problem.mean_return - problem.risk_free) - rate
    drift -= 0.5 * (share * problem.volatility) ** 2
    exact = quad(lambda t: np.exp(-problem.discount * t) * (np.log(rate) + drift * t), 0, np.inf)[0]
    obtained = problem.policy_value(share, rate)
    yield Measurement(name="V(1) at (0.9, 0.06)", exact=exact, obtained=obtained, error=abs(obtained / exact - 1),
                      tolerance=1e-9)  # fmt: skip


CHECKS: tuple[Check, ...] = (
    Check(
        name="constants",
        group="merton",
        claim="The optimal share, consumption and value are the printed ones.",
        level="fast",
        run=_constants,
    ),
    Check(
        name="HJB",
        group="merton",
        claim="V* solves the HJB equation and no other action does better in it.",
        level="fast",
        run=_hjb,
    ),
    Check(
        name="constant controls",
        group="merton",
        claim="The value of constant controls is the mean utility of exactly sampled wealth.",
        level="fast",
        run=_constant_controls,
    ),
    Check(
        name="cost of errors",
        group="merton",
        claim="The value is nearly flat around the optimum: a tenth of the risky share costs a third of a percent.",
        level="fast",
        run=_costs,
    ),
    Check(
        name="logarithmic utility",
        group="merton",
        claim="At risk aversion 1 the utility is logarithmic, and solved as such.",
        level="fast",
        run=_logarithmic,
    ),
)
