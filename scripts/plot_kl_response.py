"""Draws how the KL follows its target under the adaptive weight, and prints the numbers as Markdown tables.

python scripts/plot_kl_response.py --output docs/images/kl_response.png

On the exact chain, and over the family of plants of `ddpo.control.problems.kl_plants`; beside it, the same with an
integrator alone: log alpha moves by `rate` times the relative error, clipped to [-1, 1] (Ziegler et al.,
arXiv:1909.08593, section 2.2), on the chain from a weight of .01. About a minute.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ddpo.control.checks.kl_response import LEARNING_RATES, TARGET, controller, small_problem
from ddpo.control.diffusion.kl_response import Controller, Response, respond, reward_std
from ddpo.control.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, legend, new_figure, panel
from ddpo.control.problems.kl_plants import family, kl_over_target
from ddpo.credit.kl import AdaptiveKL, first_alpha

RATES = (0.003, *LEARNING_RATES)
COLOURS = (PURPLE, BLUE, GREEN, ORANGE)
SPEEDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
BAR = 1.5


def integrator(rate: float, *, target: float = TARGET) -> Controller:
    """The undamped controller."""

    def control(alpha: float, path_kl: float) -> float:
        return alpha * math.exp(rate * min(1.0, max(-1.0, path_kl / target - 1)))

    return control


def responses() -> dict[str, list[Response]]:
    """By controller, a response at each learning rate."""
    problem, config = small_problem(), AdaptiveKL(target=TARGET)
    rules: dict[str, tuple[Callable[[], Controller], float]] = {
        "adaptive": (lambda: controller(config), first_alpha(config, reward_std(problem))),
        "integrator alone": (lambda: integrator(0.1), 0.01),
    }
    return {
        name: [
            respond(problem, make(), start=first, learning_rate=rate, epochs=200 if rate < 0.01 else 100)
            for rate in RATES
        ]
        for name, (make, first) in rules.items()
    }


def plants() -> dict[str, dict[float, list[float]]]:
    """By controller and speed, the largest KL over target of each plant."""
    rules: dict[str, Callable[[], Controller]] = {
        "adaptive": lambda: controller(AdaptiveKL(target=1.0)),
        "integrator alone": lambda: integrator(0.1, target=1.0),
    }
    return {
        name: {
            speed: [max(kl_over_target(plant, make(), seed=seed)) for seed, plant in enumerate(family(speeds=(speed,)))]
            for speed in SPEEDS
        }
        for name, make in rules.items()
    }


def draw(found: dict[str, list[Response]], peaks: dict[str, dict[float, list[float]]]) -> Figure:
    """A panel for each controller on the chain, KL over target by epoch; one of the plants' peaks by speed."""
    figure = new_figure(3.2, width=10.5)
    every = figure.subplots(1, 3)
    for axes, (name, runs) in zip(every, found.items(), strict=False):
        _mark(axes)
        for run, rate, colour in zip(runs, RATES, COLOURS, strict=True):
            axes.plot([kl / TARGET for kl in run.kl], color=colour, linewidth=1.4, label=f"learning rate {rate:g}")
        axes.set_ylim(0.02, 60)
        panel(axes, f"chain: {name}", "epoch", "path KL / target" if axes is every[0] else "")
    legend(every[0], "lower right")
    _mark(every[2])
    for (name, by_speed), colour, offset in zip(peaks.items(), (BLUE, GREY), (0.93, 1.07), strict=True):
        for speed, values in by_speed.items():
            x = [speed * offset] * len(values)
            label = name if speed == SPEEDS[0] else None
            axes = every[2]
            axes.scatter(x, values, s=5, color=colour, alpha=0.35, linewidths=0, label=label)
    every[2].set_xscale("log")
    every[2].set_ylim(0.2, 60)
    panel(every[2], f"{sum(map(len, peaks['adaptive'].values())):,} plants: largest KL / target", "speed", "")
    legend(every[2], "upper right")
    return figure


def _mark(axes: Axes) -> None:
    """The bars, on a logarithmic axis."""
    axes.axhspan(0.9, 1.1, color=GREY, alpha=0.25, linewidth=0)
    axes.axhline(BAR, color=GREY, linestyle=":", linewidth=1)
    axes.set_yscale("log")


def chain_table(found: dict[str, list[Response]]) -> str:
    """Overshoot and epochs to 10 % of the target, a row a controller."""
    lines = [f"| largest KL / target; epochs to 10 % | {' | '.join(f'learning rate {r:g}' for r in RATES)} |"]
    lines.append("|---" * (len(RATES) + 1) + "|")
    for name, runs in found.items():
        cells = []
        for run in runs:
            settled = run.settled(TARGET)
            never = settled >= len(run.kl)
            cells.append(f"{run.overshoot(TARGET):.2f}; {f'never within {len(run.kl)}' if never else settled}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plants_table(peaks: dict[str, dict[float, list[float]]]) -> str:
    """The worst plant of each speed, and the share of all that exceed the bar."""
    lines = [f"| largest KL / target by speed | {' | '.join(f'{s:g}' for s in SPEEDS)} | above {BAR:g} |"]
    lines.append("|---" * (len(SPEEDS) + 2) + "|")
    for name, by_speed in peaks.items():
        every = [peak for values in by_speed.values() for peak in values]
        above = f"{sum(peak > BAR for peak in every):,} of {len(every):,}"
        lines.append(f"| {name} | {' | '.join(f'{max(by_speed[s]):.2f}' for s in SPEEDS)} | {above} |")
    return "\n".join(lines)


def main() -> None:
    """Reads the arguments, writes the picture and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("kl_response.png"), help="picture (default %(default)s)")
    options = parser.parse_args()
    found, peaks = responses(), plants()
    draw(found, peaks).savefig(options.output)
    print(chain_table(found), plants_table(peaks), sep="\n\n")


if __name__ == "__main__":
    main()
