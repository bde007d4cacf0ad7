"""Draws how the evaluations of runs went on: a panel a measure, a line a run, one standard error as a band.

python scripts/plot_progress.py runs/a runs/b --measures heldout/shapes_strict "kl (nats)" diversity
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from trainers.run_folder.folder import read_metrics

AGAINST = {"epoch": ("epoch", 1.0), "images": ("samples", 1.0), "minutes": ("time/total_seconds", 60.0)}


def evaluations(run: Path) -> dict[int, dict[str, dict[str, float]]]:
    """Epoch to measure to mean and error, of a run's evaluations by the order of epochs."""
    files = sorted((run / "evaluations").glob("epoch_*.json"))
    if not files:
        raise SystemExit(f"{run} has no evaluations (evaluation.every_epochs)")
    read = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {found["epoch"]: found["measures"] for found in read}


def positions(run: Path, epochs: list[int], against: str) -> list[float]:
    """Where on the x axis each epoch lies; epoch 0 at 0."""
    key, unit = AGAINST[against]
    reached = {int(row["epoch"]): float(row[key]) / unit for row in read_metrics(run)}
    return [reached.get(epoch, 0.0) for epoch in epochs]


def draw(runs: list[Path], measures: list[str], against: str) -> Figure:
    """The figure.

    Raises:
        SystemExit: A run has no such measure; the message lists what it has.
    """
    figure = Figure(figsize=(4.2 * len(measures), 3.2), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        for run in runs:
            found = evaluations(run)
            for epoch, values in found.items():
                if measure not in values:
                    raise SystemExit(f"{run} has no measure {measure!r} at epoch {epoch}; it has {', '.join(values)}")
            x = positions(run, list(found), against)
            mean = [values[measure]["mean"] for values in found.values()]
            error = [values[measure]["error"] for values in found.values()]
            (line,) = axes.plot(x, mean, "-o", markersize=3, label=run.name)
            low, high = zip(*((m - e, m + e) for m, e in zip(mean, error, strict=True)), strict=True)
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(title=measure, xlabel=against)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    return figure


def main() -> None:
    """Reads the arguments and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--measures", nargs="+", default=["reward", "kl (nats)", "diversity"], metavar="NAME")
    parser.add_argument("--against", choices=AGAINST, default="epoch", help="the x axis (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("progress.png"), help="picture (default %(default)s)")
    options = parser.parse_args()
    draw(options.runs, options.measures, options.against).savefig(options.output)
    print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
