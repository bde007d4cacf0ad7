"""Draws what runs gained against what it cost: two measures of their evaluations, a line a run, a colour a KL weight.

python scripts/plot_tradeoff.py runs/a runs/b ... --x jpeg_compressibility --y heldout/shapes_strict --output trade.png
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from trainers.config_io import load_config
from trainers.evaluation import Evaluation, Measure, evaluation_prompts

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def course(run: Path, measure: str) -> list[Measure]:
    """A measure at each of a run's evaluations, oldest first."""
    texts = [prompt.text for prompt in evaluation_prompts(load_config(run / "config.yaml"))]
    names = sorted(path.stem for path in (run / "evaluations").glob("epoch_*.safetensors"))
    summaries = [Evaluation.load(run / "evaluations", name, texts).summary() for name in names]
    unknown = [name for name in (measure,) if name not in summaries[0]]
    if unknown:
        raise SystemExit(f"{run} has no measure {measure!r}; it has {', '.join(summaries[0])}")
    return [summary[measure] for summary in summaries]


def draw(runs: list[Path], x: str, y: str) -> Figure:
    """The figure."""
    figure = Figure(figsize=(7, 4.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    alphas = sorted({load_config(run / "config.yaml").kl.alpha for run in runs})
    for run in runs:
        alpha = load_config(run / "config.yaml").kl.alpha
        along, up = course(run, x), course(run, y)
        colour = COLOURS[alphas.index(alpha) % len(COLOURS)]
        axes.plot([m.mean for m in along], [m.mean for m in up], "-o", color=colour, markersize=3, alpha=0.8)
        axes.errorbar(along[-1].mean, up[-1].mean, xerr=along[-1].error, yerr=up[-1].error, color=colour, fmt="s",
                      capsize=3, label=f"alpha {alpha:g}")  # fmt: skip
    handles, labels = axes.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    axes.legend(shown.values(), shown.keys(), frameon=False, title="weight of the KL")
    start_x, start_y = course(runs[0], x)[0], course(runs[0], y)[0]
    axes.annotate("pretrained", (start_x.mean, start_y.mean), xytext=(6, 8), textcoords="offset points")
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


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
