"""Merton's portfolio as neural policy iteration learns it, over its exact solution.

V = -exp(w(log x)) with w a small network, collocation of relative errors, improvement by Newton's method.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpo.control.figures.style import AMBER, BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, legend, new_figure, panel
from ddpo.control.problems.merton import Merton
from ddpo.control.solvers.improvement import GreedyPolicy, snapshot
from ddpo.control.solvers.networks import PowerMLP, uniform_box
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

_LOW, _HIGH = 0.25, 4.0


def merton_figure(*, seed: int = 0) -> "Figure":
    """Controls and value over wealth, wealth paths with what they earn, and convergence; about 5 seconds."""
    problem, rng = Merton(), torch.Generator().manual_seed(seed)
    value = PowerMLP(sign=-1, generator=rng)
    policies: list[Policy] = []

    def keep(_: Iteration) -> None:
        policies.append(GreedyPolicy(problem=problem, value=snapshot(value), start=_start))

    result = policy_iteration(
        problem,
        value,
        _start,
        _states,
        config=PolicyIterationConfig(
            num_iterations=6,
            relative=True,
            closed_loop_paths=64,
            closed_loop_dt=1.0,
            closed_loop_scheme="log_euler",
        ),
        generator=rng,
        on_iteration=keep,
    )
    figure = new_figure(5.0, width=10.0)
    axes = figure.subplot_mosaic([list("ppppccccvvvv"), list("wwwuuueeejjj")])
    _controls(axes["p"], axes["c"], problem, policies)
    _value(axes["v"], problem, result)
    _paths(axes["w"], axes["u"], problem, result.policy, seed)
    _convergence(axes["e"], axes["j"], problem, result, policies)
    return figure


def _start(x: Tensor) -> Tensor:
    """A cautious policy: 30% in the risky asset, 6% consumed."""
    return x.new_tensor([0.3, 0.06]).expand(len(x), -1)


def _states(count: int, generator: torch.Generator) -> Tensor:
    """Wealth beyond the range that is shown, log-uniformly: nothing pins the equation down at the ends."""
    return uniform_box(math.log(_LOW / 4), math.log(4 * _HIGH))(count, generator).exp()


def _grid() -> Tensor:
    return torch.linspace(_LOW, _HIGH, 76, dtype=torch.float64)[:, None]


def _controls(left: "Axes", right: "Axes", problem: Merton, policies: list[Policy]) -> None:
    """Both controls over wealth; the exact ones are constant."""
    x = _grid()
    exact = problem.optimal_action(x)
    last = len(policies) - 1
    for column, axes, title, label in (
        (0, left, "Risky share", "pi, of wealth"),
        (1, right, "Consumption", "k, of wealth per year"),
    ):
        axes.plot(x, exact[:, column], color=BLACK, linewidth=3.5, alpha=0.35, label="exact")
        axes.plot(x, _start(x)[:, column], ":", color=GREY, linewidth=1.2, label="start")
        for index, colour in ((0, SKY), (1, AMBER), (last, BLUE)):
            line = "--" if index == last else "-"
            drawn = policies[index](x).detach()[:, column]
            axes.plot(x, drawn, line, color=colour, linewidth=1.3, label=f"iteration {index + 1}")
        panel(axes, title, "wealth x", label)
    legend(left, "lower right")


def _value(axes: "Axes", problem: Merton, result: PolicyIterationResult) -> None:
    x = _grid()
    with torch.no_grad():
        learned = result.value(x)
    axes.plot(x, problem.value(x), color=BLACK, linewidth=3.5, alpha=0.35, label="exact")
    axes.plot(x, learned, "--", color=BLUE, linewidth=1.5, label="learned")
    panel(axes, "Value", "wealth x", "V(x), utility")
    legend(axes, "lower right")


def _paths(wealth: "Axes", utility: "Axes", problem: Merton, learned: Policy, seed: int) -> None:
    """Three paths of wealth and their discounted utility up to each time; every policy meets the same market."""
    best = problem.solution()
    start = torch.ones(3, 1, dtype=torch.float64)

    def bond_only(x: Tensor) -> Tensor:
        return x.new_tensor([0.0, best.consumption_rate]).expand(len(x), -1)

    drawn: tuple[tuple[str, Policy, dict[str, object]], ...] = (
        ("bond only", bond_only, {"color": GREY, "linewidth": 0.9}),
        ("exact policy", problem.optimal_action, {"color": BLACK, "linewidth": 3.0, "alpha": 0.35}),
        ("learned policy", learned, {"color": BLUE, "linewidth": 1.1, "linestyle": "--"}),
    )
    for name, policy, look in drawn:
        rng = torch.Generator().manual_seed(seed + 1)
        paths = simulate(problem, policy, start, dt=0.25, num_steps=120, generator=rng, scheme="log_euler")
        for b in range(3):
            wealth.plot(paths.times, paths.states[:, b, 0], label=name if b == 0 else None, **look)
            utility.plot(paths.times, paths.cumulative[:, b], **look)
    value = float(problem.value(start[:1]))
    utility.axhline(value, color=BLACK, linestyle=":", linewidth=1.0, label="V(1), over all time")
    panel(wealth, "Wealth from 1, same market", "years", "wealth")
    panel(utility, "What these paths earn", "years", "discounted utility up to t")
    legend(wealth, "upper left")
    legend(utility, "upper right")


def _convergence(
    errors: "Axes", objective: "Axes", problem: Merton, result: PolicyIterationResult, policies: list[Policy]
) -> None:
    """Largest error of the controls over the wealth, and the exact value of constant controls like those learned."""
    x, best = _grid(), problem.solution()
    controls = torch.stack([policy(x).detach() for policy in policies])
    off = (controls / problem.optimal_action(x) - 1).abs().amax(1)
    steps = range(1, len(policies) + 1)
    errors.plot(steps, off[:, 0], "o-", color=ORANGE, markersize=3, label="risky share, worst wealth")
    errors.plot(steps, off[:, 1], "s-", color=PURPLE, markersize=3, label="consumption, worst wealth")
    fit, residual = ([getattr(r, name) for r in result.history] for name in ("fit_error", "hjb_residual"))
    errors.plot(steps, fit, "^-", color=GREEN, markersize=3, label="error of the fit, per year")
    everywhere = torch.linspace(math.log(_LOW / 4), math.log(4 * _HIGH), 201, dtype=torch.float64).exp()[:, None]
    unit = problem.discount * float(problem.value(everywhere).square().mean().sqrt())
    errors.plot(steps, [r / unit for r in residual], "v-", color=BLUE, markersize=3, label="HJB residual / rms rho V")
    errors.set_yscale("log")
    errors.set_ylim(top=30)
    panel(errors, "Convergence", "iteration", "relative error")
    legend(errors, "upper right")
    middle = controls[:, len(x) // 2]
    earned = [problem.policy_value(float(pi), float(k)) for pi, k in middle]
    objective.axhline(best.scale / (1 - problem.risk_aversion), color=BLACK, linewidth=3.5, alpha=0.35, label="optimum")
    objective.plot(steps, earned, "o--", color=BLUE, markersize=3, label="policy after the iteration")
    panel(objective, "Exact J from wealth 1", "iteration", "J, utility")
    legend(objective, "lower right")
