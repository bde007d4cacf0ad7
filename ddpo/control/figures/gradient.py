"""The gradient check, and what it looks like when one mistake is made.

The mistake is the most common one: the KL of later steps does not enter the return of an action, only the step's own KL
is in the loss. Its advantages are those of `ddpo.credit.advantages` for a KL of zero.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpo.control.checks.gradient import REINFORCE
from ddpo.control.diffusion.gradient_check import (
    GradientComparison,
    Paths,
    compare_gradients,
    draw_paths,
    make_experience,
    objective_gradient,
    trained_rows,
)
from ddpo.control.diffusion.toy_problem import toy_problem
from ddpo.control.figures.style import BLACK, BLUE, GREY, ORANGE, legend, new_figure, panel
from ddpo.credit.advantages import AdvantageConfig, AdvantageEstimator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PLAIN = AdvantageConfig(baseline="batch", scale="none", clip=None)


def gradient_figure(*, num_paths: int = 50_000) -> "Figure":
    """Scatter and z-scores of the correct gradient above those of the mistake; about 4 seconds."""
    figure = new_figure(6.2)
    axes = figure.subplots(2, 2, width_ratios=(1.25, 1))
    for row, (name, found, colour) in enumerate(gradient_comparisons(num_paths=num_paths)):
        draw_scatter(axes[row, 0], found, title=name, colour=colour)
        _histogram(axes[row, 1], found, colour)
    return figure


def gradient_comparisons(*, num_paths: int = 50_000, seed: int = 0) -> tuple[tuple[str, GradientComparison, str], ...]:
    """Name, comparison and colour of the correct gradient, and of the one with the mistake."""
    paths = draw_paths(toy_problem(), num_paths=num_paths, chunk_size=1_000, seed=seed)
    correct = compare_gradients(paths, REINFORCE, _PLAIN)
    return (
        ("ddpo", correct, BLUE),
        ("mistake, later KL not in the return", _without_later_kl(paths, correct), ORANGE),
    )


def _without_later_kl(paths: Paths, correct: GradientComparison) -> GradientComparison:
    """The comparison for advantages that only know the reward."""
    alpha = paths.problem.alpha
    estimates = []
    for path, scores in zip(paths.chunks, paths.scores, strict=True):
        assert path.kl is not None
        experience, _ = make_experience(path, scores, _PLAIN, alpha)
        blind = AdvantageEstimator(_PLAIN)(
            scores,
            experience.groups,
            [""] * len(scores),
            kl=torch.zeros_like(path.kl),
            alpha=alpha,
            num_steps=path.schedule.num_steps,
        )
        estimates.append(
            objective_gradient(
                paths.policy, replace(experience, advantages=blind.values), REINFORCE, rows=trained_rows(paths)
            )
        )
    stacked = torch.stack(estimates)
    return replace(correct, estimate=stacked.mean(0), standard_error=stacked.std(0) / len(stacked) ** 0.5)


def draw_scatter(axes: "Axes", found: GradientComparison, *, title: str, colour: str) -> None:
    """Monte Carlo components over exact ones, with 2 standard errors; correct ones lie on the diagonal."""
    ends = [float(found.exact.min()), float(found.exact.max())]
    axes.plot(ends, ends, color=BLACK, linewidth=3.0, alpha=0.3, label="exact")
    axes.errorbar(
        found.exact,
        found.estimate,
        yerr=2 * found.standard_error,
        fmt="o",
        color=colour,
        markersize=2.5,
        elinewidth=0.7,
        label="Monte Carlo ± 2 standard errors",
    )
    panel(axes, f"{title}: rms z {found.rms_z:.2f}, max {found.max_z:.1f}", "exact dJ/dw", "estimated dJ/dw")
    legend(axes, "upper left")


def draw_errors(axes: "Axes", comparisons: Sequence[tuple[str, GradientComparison, str]]) -> None:
    """Errors of the components over the exact ones, with 2 standard errors; correct ones have bars that reach 0."""
    axes.axhline(0, color=BLACK, linewidth=3.0, alpha=0.3)
    for name, found, colour in comparisons:
        axes.errorbar(
            found.exact,
            found.estimate - found.exact,
            yerr=2 * found.standard_error,
            fmt="o",
            color=colour,
            markersize=2.5,
            elinewidth=0.7,
            label=f"{name}: rms z {found.rms_z:.1f}",
        )
    axes.margins(y=0.16)
    panel(axes, "Monte Carlo gradient against the exact one", "exact dJ/dw", "estimated - exact, ± 2 standard errors")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=7.5, loc="upper right", frameon=False)


def _histogram(axes: "Axes", found: GradientComparison, colour: str) -> None:
    """z-scores against the standard normal density."""
    reach = max(4.0, float(found.z.abs().max()))
    bins = torch.linspace(-reach, reach, 33 if reach < 8 else 65)
    axes.hist(found.z, bins=bins, density=True, color=colour, alpha=0.75, label=f"{len(found.z)} parameters")
    x = torch.linspace(-reach, reach, 801)
    axes.plot(x, _normal_density(x), color=BLACK, linewidth=1.3, label="N(0, 1)")
    axes.axvline(0, color=GREY, linewidth=0.6)
    panel(axes, "z-scores", "(estimate - exact) / standard error", "density")
    legend(axes, "upper right")


def _normal_density(x: Tensor) -> Tensor:
    return torch.distributions.Normal(0.0, 1.0).log_prob(x).exp()
