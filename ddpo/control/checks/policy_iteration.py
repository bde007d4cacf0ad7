"""Neural policy iteration against Riccati's gains, Merton's controls and the exact bias of its time step."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.problems.lqr import StochasticLQR
from ddpo.control.problems.merton import Merton
from ddpo.control.solvers.evaluation import RolloutConfig
from ddpo.control.solvers.networks import Actor, PowerMLP, QuadraticMLP, uniform_box
from ddpo.control.solvers.policy_iteration import PolicyIterationConfig, PolicyIterationResult, policy_iteration
from ddpo.control.solvers.simulate import Policy, Scheme


def four_dimensional() -> StochasticLQR:
    """A stable regulator of four states, two actions and four noises."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4, 4))
    a = a - (np.linalg.eigvals(a).real.max() + 0.3) * np.eye(4)
    return StochasticLQR(a, rng.normal(size=(4, 2)), np.eye(4), 0.3 * np.eye(2), 0.3 * np.eye(4), discount=0.1)


def policy_error(problem: StochasticLQR, policy: Policy) -> float:
    """Root mean square error of the actions on [-1.5, 1.5]^n, relative to the optimal ones'."""
    x = uniform_box(-1.5, 1.5, dim=problem.state_dim)(512, torch.Generator().manual_seed(9))
    exact = problem.optimal_action(x)
    return float(((policy(x) - exact).square().mean() / exact.square().mean()).sqrt())


def slope(policy: Policy) -> float:
    """The gain that fits the actions on [-1.5, 1.5] best."""
    x = torch.linspace(-1.5, 1.5, 61, dtype=torch.float64)[:, None]
    return -float((policy(x) * x).sum() / x.square().sum())


def solve_regulator(
    problem: StochasticLQR, config: PolicyIterationConfig, *, seed: int, width: int, depth: int, skip: bool = True
) -> PolicyIterationResult:
    """Policy iteration on [-2, 2]^n from the policy that does nothing."""
    rng = torch.Generator().manual_seed(seed)
    value = QuadraticMLP(problem.state_dim, generator=rng, width=width, depth=depth, scale=2.0, skip=skip)

    def nothing(x: Tensor) -> Tensor:
        return x.new_zeros(len(x), problem.action_dim)

    box = uniform_box(-2.0, 2.0, dim=problem.state_dim)
    return policy_iteration(problem, value, nothing, box, config=config, generator=rng)


def collocation(seed: int, *, skip: bool = True) -> PolicyIterationResult:
    """The scalar regulator by collocation."""
    config = PolicyIterationConfig(
        num_iterations=7, value_steps=80, closed_loop_paths=64, closed_loop_dt=0.1, closed_loop_horizon=30.0
    )
    return solve_regulator(StochasticLQR.example(), config, seed=seed, width=32, depth=2, skip=skip)


def collocation_four(seed: int) -> PolicyIterationResult:
    """Four dimensions by collocation."""
    config = PolicyIterationConfig(
        num_iterations=7, num_points=1024, closed_loop_paths=64, closed_loop_dt=0.1, closed_loop_horizon=30.0
    )
    return solve_regulator(four_dimensional(), config, seed=seed, width=32, depth=2)


def sampled(
    evaluate: Literal["monte_carlo", "residual"], scheme: Scheme, dt: float, seed: int
) -> PolicyIterationResult:
    """The scalar regulator by Monte Carlo (`monte_carlo`) or residual targets (`residual`)."""
    many = evaluate == "residual"
    config = PolicyIterationConfig(
        evaluate=evaluate,
        num_iterations=14 if many else 7,
        num_points=2048 if many else 1024,
        value_steps=60,
        closed_loop_paths=2,
        closed_loop_horizon=1.0,
        rollouts=RolloutConfig(dt=dt, horizon=1.0, scheme=scheme, num_paths=8),
    )
    return solve_regulator(StochasticLQR.example(), config, seed=seed, width=16, depth=1)


def merton(seed: int) -> tuple[float, float]:
    """Mean relative errors of the risky share and the consumption rate, on log wealth in [-1.2, 1.2]."""
    problem, rng, logs = Merton(), torch.Generator().manual_seed(seed), uniform_box(-1.5, 1.5)
    actor = Actor(
        1,
        2,
        generator=rng,
        width=16,
        features=torch.log,
        transform=lambda z: torch.stack([0.3 + z[:, 0], 0.03 * torch.exp(z[:, 1])], 1),
    )
    config = PolicyIterationConfig(
        evaluate="monte_carlo",
        improve="actor",
        num_iterations=16,
        num_points=2048,
        value_steps=30,
        relative=True,
        rollouts=RolloutConfig(dt=1.0, horizon=10.0, scheme="log_euler", num_paths=64),
        closed_loop_scheme="log_euler",
        closed_loop_dt=1.0,
    )
    policy_iteration(
        problem,
        PowerMLP(sign=-1, generator=rng),
        actor,
        lambda count, source: logs(count, source).exp(),
        config=config,
        generator=rng,
    )
    x = torch.linspace(-1.2, 1.2, 41, dtype=torch.float64).exp()[:, None]
    with torch.no_grad():
        share, rate = (actor(x) / problem.optimal_action(x) - 1).square().mean(0).sqrt().tolist()
    return share, rate


def chain_gain(dt: float, scheme: Scheme) -> float:
    """Where improving the exact value of the scalar example's chain leaves the gain unchanged.

    A step multiplies the state by m(l dt), l = K + 1/2, with m = 1 - z for Euler and 1 - z + z^2 / 2 for Heun. Rewards
    w = q + K^2 r are summed by left rectangles or trapezoids, and K = P / r is greedy in continuous time.
    """
    gain = 2.66
    for _ in range(500):
        z = (gain + 0.5) * dt
        factor = 1 - z if scheme == "euler" else 1 - z + z * z / 2
        decay = float(np.exp(-0.1 * dt)) * factor**2
        weight = (1 + 0.1 * gain**2) * dt
        gain = 10 * weight * (1 / (1 - decay) if scheme == "euler" else 0.5 * (1 + decay) / (1 - decay))
    return gain


def _collocation() -> Iterator[Measurement]:
    problem = StochasticLQR.example()
    result = collocation(0)
    error = policy_error(problem, result.policy)
    yield Measurement(
        name="gain, relative",
        exact=problem.solution().K.item(),
        obtained=slope(result.policy),
        error=error,
        tolerance=1e-3,
    )
    last = result.history[-1]
    assert last.shortfall is not None
    # The simulation's step of .1 and its end at t = 30 are worth about .01 each.
    yield Measurement(
        name="value predicted less earned",
        exact=0.0,
        obtained=last.shortfall.mean,
        error=abs(last.shortfall.mean),
        tolerance=0.04,
    )


def _collocation_four() -> Iterator[Measurement]:
    error = policy_error(four_dimensional(), collocation_four(0).policy)
    yield Measurement(name="actions, relative", exact=0.0, obtained=error, error=error, tolerance=5e-3)


def _textbook(scheme: Scheme, dt: float, tolerance: float) -> Iterator[Measurement]:
    exact = StochasticLQR.example().solution().K.item()
    expected = chain_gain(dt, scheme) / exact - 1
    obtained = slope(sampled("monte_carlo", scheme, dt, 0).policy) / exact - 1
    yield Measurement(
        name=f"gain bias, {scheme} at dt {dt}",
        exact=expected,
        obtained=obtained,
        error=abs(obtained - expected),
        tolerance=tolerance,
    )


def _residual() -> Iterator[Measurement]:
    problem = StochasticLQR.example()
    policy = sampled("residual", "heun", 0.1, 0).policy
    yield Measurement(
        name="gain, relative, at dt .1",
        exact=problem.solution().K.item(),
        obtained=slope(policy),
        error=policy_error(problem, policy),
        tolerance=1e-3,
    )


def _merton() -> Iterator[Measurement]:
    solution = Merton().solution()
    names = ("risky share", "consumption rate")
    for name, exact, error in zip(names, (solution.risky_share, solution.consumption_rate), merton(0), strict=True):
        yield Measurement(name=f"{name}, relative", exact=exact, obtained=error, error=error, tolerance=1e-2)


def _full(name: str, claim: str, run: Callable[[], Iterator[Measurement]]) -> Check:
    return Check(name=name, group="hjb", claim=claim, level="full", run=run)


CHECKS: tuple[Check, ...] = (
    Check(
        name="collocation",
        group="hjb",
        claim="Policy iteration by collocation finds the scalar regulator's gain, and its policy earns what V says.",
        level="fast",
        run=_collocation,
    ),
    _full("collocation, d = 4", "It finds the gain in four dimensions.", _collocation_four),
    _full(
        "Monte Carlo, Euler",
        "Monte Carlo with Euler steps and rectangles finds the gain of its chain, 10% off.",
        partial(_textbook, "euler", 0.05, 1e-2),
    ),
    _full(
        "Monte Carlo, Heun",
        "With Heun's steps and trapezoids the bias is of second order.",
        partial(_textbook, "heun", 0.025, 5e-3),
    ),
    _full("residual targets", "Targets in residual form have no bias of the time step.", _residual),
    _full("Merton", "Merton's controls come from exactly sampled wealth by Monte Carlo and an actor.", _merton),
)
