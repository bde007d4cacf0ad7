"""Generation as control on a mixture: what the optimal control samples, and the verification identity.

J(u) = E V(X_0) + 1/2 E int |u - u*|^2 dt        (Berner et al., arXiv:2211.01364)
"""

from typing import TYPE_CHECKING

import torch

from ddpo.control.diffusion.time_reversal import VPSDE, Scheme, TimeReversal, Verification, perturbed_controls, verify
from ddpo.control.figures.style import AMBER, BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, legend, new_figure, panel
from ddpo.control.problems.mixture import gaussian_mixture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def diffusion_figure(*, num_paths: int = 16_000) -> "Figure":
    """Density of samples, error of the identity against steps, and its two sides; about 8 seconds."""
    data = gaussian_mixture([0.3, 0.7], [[-1.5], [1.0]], [0.4, 0.6])
    problem = TimeReversal(data=data, sde=VPSDE())
    figure = new_figure(3.3, width=8.8)
    left, middle, right = figure.subplots(1, 3)
    _density(left, problem, num_paths)
    _errors(middle, problem, num_paths)
    _sides(right, problem, num_paths)
    return figure


def _run(problem: TimeReversal, num_steps: int, num_paths: int, scheme: Scheme) -> Verification:
    rng = torch.Generator().manual_seed(0)
    return verify(
        problem, problem.optimal_control, num_steps=num_steps, num_paths=num_paths, generator=rng, scheme=scheme
    )


def _density(axes: "Axes", problem: TimeReversal, num_paths: int) -> None:
    """Samples of coarse and fine steps against the data."""
    x = torch.linspace(-4, 4, 401, dtype=torch.float64)
    bins = torch.linspace(-4, 4, 65)
    for num_steps, colour in ((10, AMBER), (100, BLUE)):
        samples = _run(problem, num_steps, num_paths, "euler").terminal[:, 0]
        axes.hist(samples, bins=bins, density=True, histtype="stepfilled", color=colour, alpha=0.2)
        axes.hist(samples, bins=bins, density=True, histtype="step", color=colour, label=f"samples, {num_steps} steps")
    noise = torch.distributions.Normal(0.0, 1.0).log_prob(x).exp()
    axes.plot(x, noise, ":", color=GREY, linewidth=1.2, label="noise it starts from")
    axes.plot(x, problem.data.log_prob(x[:, None]).exp(), color=BLACK, linewidth=1.5, label="data")
    axes.set_ylim(top=0.75)
    panel(axes, "What the control u* generates", "x", "density")
    legend(axes, "upper left", size=7)


def _errors(axes: "Axes", problem: TimeReversal, num_paths: int) -> None:
    """|J - V - gap|, its mean-zero part taken off, against steps, with the order that the scheme has."""
    steps = (10, 20, 40, 80, 160)
    schemes: tuple[tuple[Scheme, int, int, str], ...] = (("euler", 1, -1, ORANGE), ("heun", 2, 1, GREEN))
    for scheme, order, anchor, colour in schemes:
        found = [_run(problem, num, num_paths, scheme) for num in steps]
        sizes = [abs(one.bias) for one in found]
        axes.errorbar(
            steps,
            sizes,
            yerr=[one.bias_standard_error for one in found],
            fmt="o",
            color=colour,
            markersize=4,
            elinewidth=0.9,
            label=scheme,
        )
        guide = [sizes[anchor] * (steps[anchor] / num) ** order for num in steps]
        axes.plot(steps, guide, "--", color=BLACK, linewidth=0.9, alpha=0.6, label=f"order {order}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-3)
    axes.set_xticks(steps, [str(num) for num in steps])
    axes.minorticks_off()
    panel(axes, "Error of the identity at u*", "steps", "|J(u) - V - gap|, nats")
    legend(axes, "lower left")


def _sides(axes: "Axes", problem: TimeReversal, num_paths: int) -> None:
    """Cost of perturbed controls over the gap; the identity is the line V + gap."""
    value, reach = 0.0, 0.0
    for (name, control), colour in zip(perturbed_controls(problem).items(), (BLACK, BLUE, PURPLE, SKY), strict=True):
        rng = torch.Generator().manual_seed(1)
        found = verify(problem, control, num_steps=100, num_paths=num_paths, generator=rng, scheme="heun")
        value, reach = found.value_plus_gap - found.gap, max(reach, found.gap)
        axes.errorbar(
            found.gap,
            found.value_plus_gap + found.bias,
            yerr=2 * found.bias_standard_error,
            fmt="o",
            color=colour,
            markersize=5,
            label=f"u = {name}",
        )
    axes.plot([0, 1.1 * reach], [value, value + 1.1 * reach], color=BLACK, linewidth=3, alpha=0.25, label="V + gap")
    panel(axes, "Cost of four controls", "gap = E int |u - u*|^2 dt / 2, nats", "J(u), nats")
    legend(axes, "upper left", size=7)
