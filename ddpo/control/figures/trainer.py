"""How far the trainer is from the optimum, and where it would end with a mistake.

    gap = (J* - J) / (J* - J_ref)

0 is the optimum, 1 the pretrained policy. The trainer's own runs are measured elsewhere and handed in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ddpo.control.diffusion.chain import AffineChain, Quadratic, objective, optimum, relative_gap
from ddpo.control.diffusion.toy_problem import ToyProblem, toy_problem
from ddpo.control.figures.gradient import draw_errors, gradient_comparisons
from ddpo.control.figures.style import AMBER, BLACK, BLUE, GREEN, ORANGE, PURPLE, legend, new_figure, panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""(paths drawn, gap) of runs of different lengths, by name of the algorithm."""


def trainer_figure(curves: Curves, *, bar: float) -> "Figure":
    """The gap of runs against the paths that they drew, with the bar and with what two mistakes converge to."""
    figure = new_figure(3.9)
    draw_gaps(figure.subplots(), curves, bar=bar)
    return figure


def readme_figure(curves: Curves, *, bar: float) -> "Figure":
    """The gradient, right and with a mistake, beside the gap of the trainer; 1000 x 420 pixels."""
    figure = new_figure(420 / 110, width=1000 / 110)
    left, right = figure.subplots(1, 2)
    draw_errors(left, tuple(reversed(gradient_comparisons())))
    draw_gaps(right, curves, bar=bar)
    return figure


def draw_gaps(axes: "Axes", curves: Curves, *, bar: float) -> None:
    """Curves on logarithmic axes; lines are named where they are."""
    styles = ((BLUE, "o-"), (GREEN, "s-"), (PURPLE, "^-"))
    drawn = [paths for points in curves.values() for paths, _ in points]
    for (name, points), (colour, line) in zip(curves.items(), styles, strict=False):
        paths, gaps = zip(*points, strict=True)
        axes.plot(paths, gaps, line, color=colour, markersize=4, linewidth=1.4, label=name)
    problem = toy_problem()
    for name, gap, colour, points_up in (
        ("converged without later KL", _gap(problem, blind_to_later_kl(problem)), ORANGE, 3),
        ("converged with 1.1 alpha", _gap(problem, _with_alpha(problem, 1.1)), AMBER, 3),
        ("bar of the check", bar, BLACK, -10),
    ):
        axes.axhline(gap, color=colour, linewidth=1.2, linestyle="--")
        place = {"xy": (min(drawn), gap), "xytext": (0, points_up), "textcoords": "offset points"}
        axes.annotate(f"{name}: {gap:.2g}", **place, fontsize=7.5, color="#333333")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(0.8 * min(drawn), 1.3 * max(drawn))
    axes.minorticks_off()
    axes.set_xticks(sorted(set(drawn)), [f"{paths / 1000:.0f}k" for paths in sorted(set(drawn))])
    axes.set_ylim(bottom=0.5 * min(bar, *(gap for points in curves.values() for _, gap in points)))
    panel(axes, "Trained policy's distance from the exact optimum", "paths drawn", "gap (J* - J) / (J* - J_ref)")
    legend(axes, "upper right")


def _gap(problem: ToyProblem, chain: AffineChain) -> float:
    def value(of: AffineChain) -> float:
        return float(objective(of, problem.reference, problem.reward, problem.alpha))

    return relative_gap(value(chain), problem.optimum.objective, value(problem.reference))


def _with_alpha(problem: ToyProblem, factor: float) -> AffineChain:
    return optimum(problem.reference, problem.reward, factor * problem.alpha).chain


def blind_to_later_kl(problem: ToyProblem) -> AffineChain:
    """What training converges to when an action is not charged the KL that it causes later.

    Each step then weighs its own KL against the mean reward alone, given what later steps do: the optimum of a chain of
    one step whose reward is that mean.
    """
    reference, value = problem.reference, problem.reward
    F, g = [], []
    for k in reversed(range(reference.num_steps)):
        step = replace(reference, F=reference.F[k : k + 1], g=reference.g[k : k + 1], cov=reference.cov[k : k + 1])
        best = optimum(step, value, problem.alpha).chain
        F.append(best.F[0])
        g.append(best.g[0])
        value = Quadratic(P=F[-1].T @ value.P @ F[-1], q=F[-1].T @ (value.q - value.P @ g[-1]), c=value.c)
    return replace(reference, F=torch.stack(F[::-1]), g=torch.stack(g[::-1]))
