"""The regulator as neural policy iteration learns it, over its exact solution.

Evaluations by collocation, improvements in closed form (`ddpo.control.solvers.policy_iteration`), on the scalar
example.
"""

from typing import TYPE_CHECKING

import torch

from ddpo.control.figures.style import AMBER, BLACK, BLUE, GREEN, GREY, ORANGE, SKY, legend, new_figure, panel
from ddpo.control.problems.lqr import StochasticLQR
from ddpo.control.solvers.improvement import GreedyPolicy, snapshot
from ddpo.control.solvers.networks import QuadraticMLP, uniform_box
from ddpo.control.solvers.policy_iteration import (
    Iteration,
    PolicyIterationConfig,
    PolicyIterationResult,
    policy_iteration,
)
from ddpo.control.solvers.simulate import Policy, simulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_START = 1.5


def lqr_figure(*, seed: int = 0) -> "Figure":
    """Value, policy, closed-loop paths with their reward, and convergence; about 8 seconds."""
    problem, rng = StochasticLQR.example(), torch.Generator().manual_seed(seed)
    value = QuadraticMLP(1, generator=rng)
    policies: list[Policy] = []

    def keep(_: Iteration) -> None:
        policies.append(GreedyPolicy(problem=problem, value=snapshot(value), start=torch.zeros_like))

    result = policy_iteration(
        problem,
        value,
        torch.zeros_like,
        uniform_box(-2.0, 2.0),
        config=PolicyIterationConfig(closed_loop_paths=64),
        generator=rng,
        on_iteration=keep,
    )
    figure = new_figure(5.0)
    axes = figure.subplots(2, 3)
    _functions(axes[0, 0], axes[0, 1], problem, result, policies)
    _convergence(axes[0, 2], axes[1, 2], problem, result, policies)
    _paths(axes[1, 0], axes[1, 1], problem, result.policy, seed)
    return figure


def _functions(
    left: "Axes", right: "Axes", problem: StochasticLQR, result: PolicyIterationResult, policies: list[Policy]
) -> None:
    """Value and policy over the state."""
    x = torch.linspace(-2, 2, 81, dtype=torch.float64)[:, None]
    with torch.no_grad():
        learned = result.value(x)
    left.plot(x, problem.value(x), color=BLACK, linewidth=3.5, alpha=0.35, label="exact")
    left.plot(x, learned, "--", color=BLUE, linewidth=1.5, label="learned")
    panel(left, "Value", "state x", "V(x), reward")
    legend(left, "lower center")
    right.plot(x, problem.optimal_action(x), color=BLACK, linewidth=3.5, alpha=0.35, label="exact")
    for index, colour in ((0, SKY), (1, AMBER)):
        right.plot(x, policies[index](x).detach(), color=colour, linewidth=1.1, label=f"iteration {index + 1}")
    right.plot(x, result.policy(x).detach(), "--", color=BLUE, linewidth=1.5, label=f"iteration {len(policies)}")
    panel(right, "Policy", "state x", "action a(x)")
    legend(right, "upper right")


def _paths(left: "Axes", right: "Axes", problem: StochasticLQR, learned: Policy, seed: int) -> None:
    """Three paths and what they earn; every policy meets the same noise."""
    start = torch.full((3, 1), _START, dtype=torch.float64)
    drawn: tuple[tuple[str, Policy, dict[str, object]], ...] = (
        ("no control", torch.zeros_like, {"color": GREY, "linewidth": 0.8}),
        ("exact policy", problem.optimal_action, {"color": BLACK, "linewidth": 3.0, "alpha": 0.35}),
        ("learned policy", learned, {"color": BLUE, "linewidth": 1.1, "linestyle": "--"}),
    )
    for name, policy, look in drawn:
        rng = torch.Generator().manual_seed(seed + 1)
        paths = simulate(problem, policy, start, dt=0.02, num_steps=200, generator=rng, scheme="euler")
        for axes, lines in ((left, paths.states[:, :, 0]), (right, paths.cumulative)):
            for b in range(3):
                axes.plot(paths.times, lines[:, b], label=name if b == 0 else None, **look)
    panel(left, f"Paths from x = {_START}, same noise", "time t", "state")
    panel(right, "What these paths earn", "time t", "discounted reward up to t")
    legend(left, "upper right")


def _convergence(
    errors: "Axes", objective: "Axes", problem: StochasticLQR, result: PolicyIterationResult, policies: list[Policy]
) -> None:
    """Errors, and the exact value of every policy on the way, which its gain decides."""
    at, best = torch.ones(1, 1, dtype=torch.float64), float(problem.solution().K.item())
    gains = [-float(policy(at).detach()) for policy in policies]
    steps = range(1, len(gains) + 1)
    errors.plot(steps, [r.hjb_residual for r in result.history], "o-", color=BLUE, markersize=3, label="HJB residual")
    errors.plot(steps, [r.fit_error for r in result.history], "s-", color=GREEN, markersize=3, label="error of the fit")
    off = [abs(gain / best - 1) for gain in gains]
    errors.plot(steps, off, "^-", color=ORANGE, markersize=3, label="gain against exact")
    errors.set_yscale("log")
    panel(errors, "Convergence", "iteration", "rms per unit time; gain relative")
    legend(errors)
    earned = [_value_of(problem, gain) for gain in gains]
    exact = float(problem.value(torch.tensor([[_START]], dtype=torch.float64)))
    objective.axhline(exact, color=BLACK, linewidth=3.5, alpha=0.35, label="optimum")
    objective.plot(steps, earned, "o--", color=BLUE, markersize=3, label="policy after the iteration")
    panel(objective, f"Exact J from x = {_START}", "iteration", "J, reward")
    legend(objective, "lower right")


def _value_of(problem: StochasticLQR, gain: float) -> float:
    """What a = -gain x earns from the start."""
    P, c = problem.policy_value(gain)
    return -0.5 * float(P.item()) * _START**2 - c
