"""Draws what runs gained against what it cost: two measures of their evaluations, a line a run, a colour a KL weight.

python scripts/plot_tradeoff.py runs/a runs/b ... --x jpeg_compressibility --y heldout/shapes_strict --output trade.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from trainers.analysis.pareto import COLOURS, draw_course, label_axes, read_course
from trainers.config.io import load_config


def draw(runs: Sequence[Path], x: str, y: str) -> Figure:
    """The figure."""
    figure = Figure(figsize=(7, 4.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    courses = [read_course(run, x, y) for run in runs]
    alphas = [_weight(run) for run in runs]
    colours = {alpha: COLOURS[i % len(COLOURS)] for i, alpha in enumerate(sorted(set(alphas)))}
    for course, alpha in zip(courses, alphas, strict=True):
        draw_course(axes, course, colour=colours[alpha], label=alpha)
    handles, labels = axes.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    axes.legend(shown.values(), shown.keys(), frameon=False, title="weight of the KL")
    start = courses[0].points[0]
    axes.annotate("pretrained", (start.x.mean, start.y.mean), xytext=(6, 8), textcoords="offset points")
    label_axes(axes, x, y)
    return figure


def _weight(run: Path) -> str:
    """How a run weighs the KL."""
    kl = load_config(run / "config.yaml").kl
    return f"alpha {kl.alpha:g}" if kl.kind == "fixed" else f"held at {kl.target:g} nats"


def main() -> None:
    """Reads the arguments and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--x", default="jpeg_compressibility", help="measure on the x axis (default %(default)s)")
    parser.add_argument("--y", default="heldout/shapes_strict", help="measure on the y axis (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("tradeoff.png"), help="picture (default %(default)s)")
    options = parser.parse_args()
    draw(options.runs, options.x, options.y).savefig(options.output)


if __name__ == "__main__":
    main()
