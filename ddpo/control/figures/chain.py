"""The exact chain in one dimension: what fine-tuning does to every marginal, and when it ends in the tilted law.

data N(1, .5^2),   r(x) = -x^2 - x,   alpha = .5,   tilted law  p_ref(x_T) exp(r(x_T) / alpha) / Z
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpo.control.diffusion.chain import (
    AffineChain,
    Quadratic,
    gaussian_data_chain,
    initial_value_bias,
    marginals,
    optimum,
    quadratic,
    tilted_terminal,
)
from ddpo.control.diffusion.toy_pipeline import toy_schedule
from ddpo.control.figures.style import BLACK, BLUE, GREEN, ORANGE, SKY, legend, new_figure, panel
from ddpo.sampling.samplers import SamplerConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ALPHA = 0.5
_SHOWN = (0, 2, 4, 6, 8, 10)
_HEIGHT = 1.3


def chain_figure() -> "Figure":
    """Marginals of the pretrained and optimal chains at eta 1 and eta 0.2, and the bias against eta; about 10 s."""
    figure = new_figure(4.3, width=8.6)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
    _ridges(left, eta=1.0)
    _ridges(middle, eta=0.2)
    middle.tick_params(left=False, labelleft=False)
    legend(left, "lower left")
    _bias(right)
    return figure


def _problem(num_steps: int, eta: float) -> tuple[AffineChain, Quadratic]:
    schedule = toy_schedule(SamplerConfig(num_steps=num_steps, eta=eta, guidance_scale=1.0))[1]
    reference = gaussian_data_chain(torch.tensor([1.0]), torch.tensor([[0.25]]), schedule)
    return reference, quadratic(torch.tensor([[2.0]]), torch.tensor([-1.0]))


def _density(x: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
    std = float(cov.sqrt())
    return torch.exp(-0.5 * ((x - float(mean)) / std) ** 2) / (std * math.sqrt(2 * math.pi))


def _ridges(axes: "Axes", *, eta: float) -> None:
    """Densities through the steps, noise at the top and the sample at the bottom."""
    reference, reward = _problem(_SHOWN[-1], eta)
    x = torch.linspace(-3, 3, 301, dtype=torch.float64)
    best = optimum(reference, reward, _ALPHA).chain
    laws = ((marginals(reference), SKY, "pretrained"), (marginals(best), ORANGE, "optimum"))
    for row, k in enumerate(_SHOWN):
        base = -_HEIGHT * row
        axes.axhline(base, color="#D0D0D0", linewidth=0.6)
        for (means, covs), colour, name in laws:
            heights = base + _density(x, means[k], covs[k])
            axes.fill_between(x, base, heights, color=colour, alpha=0.35, linewidth=0)
            axes.plot(x, heights, color=colour, linewidth=1.2, label=name if row == 0 else None)
    tilted = -_HEIGHT * (len(_SHOWN) - 1) + _density(x, *tilted_terminal(reference, reward, _ALPHA))
    axes.plot(x, tilted, "--", color=BLACK, linewidth=1.3, label="tilted law")
    axes.set_ylim(bottom=-_HEIGHT * (len(_SHOWN) - 1) - 1.5)
    panel(axes, f"T = {_SHOWN[-1]}, eta = {eta:g}", "x", "")
    axes.grid(visible=False)
    names = {0: "x_0 (noise)", _SHOWN[-1]: f"x_{_SHOWN[-1]} (sample)"}
    axes.set_yticks([-_HEIGHT * row for row in range(len(_SHOWN))], [names.get(k, f"x_{k}") for k in _SHOWN])


def _bias(axes: "Axes") -> None:
    """KL(terminal law of the optimum || tilted law)."""
    etas = (0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0)
    for num_steps, colour in ((10, ORANGE), (50, GREEN), (200, BLUE)):
        found = [initial_value_bias(*_problem(num_steps, eta), _ALPHA) for eta in etas]
        free, fixed = zip(*found, strict=True)
        axes.plot(etas, fixed, "o-", color=colour, markersize=3.5, linewidth=1.3, label=f"T = {num_steps}")
        axes.plot(etas, free, "o:", color=colour, markersize=3.5, linewidth=1.1, markerfacecolor="white")
    axes.plot([], [], "o-", color=BLACK, markersize=3.5, linewidth=1.3, label="sampler's noise")
    axes.plot([], [], "o:", color=BLACK, markersize=3.5, linewidth=1.1, markerfacecolor="white", label="free noise")
    axes.set_yscale("log")
    panel(axes, "Initial-value bias", "eta of the sampler", "KL(optimum || tilted law), nats")
    legend(axes, "lower left")
