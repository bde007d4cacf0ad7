"""An energy model by likelihood and by score matching: its density between and beyond the modes, and its errors."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from ddpo.control.checks.energy_model import LAW, NOISE, REACH, fit
from ddpo.control.figures.style import BLACK, BLUE, GREEN, ORANGE, legend, new_figure, panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def energy_model_figure() -> "Figure":
    """Log densities of 500 data's fits, and errors of the score by place and noise level; about 2 seconds."""
    figure = new_figure(3.2, width=9.6)
    left, middle, right = figure.subplots(1, 3)
    _densities(left)
    _errors(middle)
    _weights(right)
    return figure


def _densities(axes: "Axes") -> None:
    x = np.linspace(-REACH, REACH, 501)
    points = torch.from_numpy(x)[:, None]
    axes.plot(x, LAW.log_prob(points), color=BLACK, linewidth=3.5, alpha=0.35, label="law of the data")
    axes.plot(
        x, LAW.marginal(1.0, 1.0).log_prob(points), color=BLACK, linewidth=1, linestyle=":", label="smoothed by 1"
    )
    for name, noise, colour in (("likelihood", 0.0, ORANGE), ("matching, 0.1", 0.1, GREEN), ("matching, 1", 1.0, BLUE)):
        axes.plot(x, fit(noise).model.log_density(x), "--", color=colour, linewidth=1.3, label=name)
    axes.set_ylim(-26, 17)
    panel(axes, "Learned log densities", "x", "log p")
    legend(axes, "upper center", size=7)


def _errors(axes: "Axes") -> None:
    fits = [fit(noise) for noise in NOISE]
    for name, colour, matched, likelihood in (
        ("where data are", BLUE, [one.dense for one in fits], fit(0.0).dense),
        ("elsewhere", ORANGE, [one.sparse for one in fits], fit(0.0).sparse),
    ):
        axes.plot(NOISE, matched, "o-", color=colour, markersize=3.5, label=f"matching, {name}")
        axes.axhline(likelihood, color=colour, linestyle="--", linewidth=1.2, label=f"likelihood, {name}")
    axes.set_yscale("log")
    panel(axes, "Error of the score", "noise of the matching, sigma", "relative squared error")
    legend(axes, "upper right", size=7)


def _weights(axes: "Axes") -> None:
    fits = [fit(noise) for noise in NOISE]
    axes.plot(NOISE, [one.exact_left for one in fits], color=BLACK, linewidth=3.5, alpha=0.35, label="exact")
    axes.plot(NOISE, [one.left for one in fits], "o-", color=BLUE, markersize=3.5, label="matching")
    axes.axhline(fit(0.0).left, color=ORANGE, linestyle="--", linewidth=1.2, label="likelihood")
    axes.set_ylim(0, 1.05)
    panel(axes, "Weight of the left mode", "noise of the matching, sigma", "P(x < 0)")
    legend(axes, "upper right")
