"""Trains `shapes` by AdamW and by TRPO, and compares the reward of training at equal minutes and at equal images.

python scripts/compare_optimizers.py [--output runs/optimizers] [--minutes 4.5] [--seeds 0,1] [--report]
python scripts/compare_optimizers.py --chain    the exact chain instead: updates until little of J is missing

Minutes are of the run's own processor time, on one thread; evaluations do not count. A row is the mean reward of the
epochs about that minute, or about that number of images, a quarter of it to either side. Finished runs are kept.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rewards.tools.table import table
from trainers.config.optimizer import OptimizerConfig
from trainers.run_folder.folder import Metric, read_metrics
from trainers.verification.natural_gradient import RATES, adamw, course, first

METHODS: dict[str, tuple[str, ...]] = {
    "adamw": ("shapes_ppo",),
    "trpo": ("shapes_trpo",),
}
SUMMARY = "summary.json"


def train(name: str, folder: Path, *, seed: int, minutes: float) -> Path:
    """Trains one method, where that was not done yet; returns the run folder."""
    run = folder / f"{name.replace(' ', '-')}-{seed}"
    if not (run / SUMMARY).exists():
        keys = {
            "run.output_dir": folder, "run.name": run.name, "seed": seed, "max_minutes": minutes, "clock": "process",
            "evaluation.num_prompts": 32, "tracking.trackers": "[]", "checkpoints.every_epochs": 0,
        }  # fmt: skip
        told = [token for key, value in keys.items() for token in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "trainers", "train", *METHODS[name], *told]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return run


def about(rows: Sequence[dict[str, Metric]], place: Callable[[dict[str, Metric]], float], at: float) -> str:
    """The mean reward of the epochs near a place; a dash where the run has not come so far."""
    near = [float(row["reward/mean"]) for row in rows if abs(place(row) / at - 1) <= 0.25]  # type: ignore[arg-type]
    return f"{sum(near) / len(near):.3f}" if near and place(rows[-1]) >= 0.95 * at else "-"


def report(runs: dict[str, list[Path]], *, minutes: float) -> str:
    """Two tables, a column a run."""
    courses = {f"{name}, {run.name[-1]}": read_metrics(run) for name, each in runs.items() for run in each}
    header = [*courses]
    times = [minutes * share for share in (0.1, 0.25, 0.5, 0.75, 1.0)]
    images = [1000 * 2**power for power in range(7)]
    by_time = [
        (
            f"{at:.3g}",
            *(about(rows, lambda row: float(row["time/total_seconds"]) / 60, at) for rows in courses.values()),
        )  # type: ignore[arg-type]
        for at in times
    ]
    by_images = [
        (f"{at:,}", *(about(rows, lambda row: float(row["samples"]), at) for rows in courses.values()))  # type: ignore[arg-type]
        for at in images
    ]
    last = ("images", *(f"{int(rows[-1]['samples']):,}" for rows in courses.values()))  # type: ignore[arg-type]
    return "\n\n".join(
        [table(("minutes", *header), [*by_time, last], right=True), table(("images", *header), by_images, right=True)]
    )


def chain() -> str:
    """Updates until the missing share of the reachable J is below a bar, on the affine chain; J with shared weights."""
    wide = OptimizerConfig(kind="natural_gradient", radius=0.02, fisher_fraction=1.0, cg_iterations=20, damping=0.01)
    diagonal = OptimizerConfig(kind="natural_gradient", radius=0.01, preconditioner="diagonal")
    kinds = {
        "natural gradient, radius .02, exact": (wide, 12),
        "natural gradient, radius .01, exact": (replace(wide, radius=0.01), 12),
        "TRPO, radius .01": (OptimizerConfig(kind="trpo", radius=0.01), 12),
        "diagonal, radius .01": (diagonal, 12),
        **{f"AdamW, rate {rate:g}": (adamw(rate), 40) for rate in (0.02, *RATES)},
    }
    bars = (0.2, 0.1, 0.05, 0.02)
    gaps = {name: course(*kind)[0] for name, kind in kinds.items()}
    rows = [(name, *(str(first(found, bar) or "-") for bar in bars)) for name, found in gaps.items()]
    shared = {
        "TRPO, radius .05": OptimizerConfig(kind="trpo", radius=0.05),
        "TRPO, radius .01": OptimizerConfig(kind="trpo", radius=0.01),
        **{f"AdamW, rate {rate:g}": adamw(rate) for rate in RATES},
    }
    values = {name: course(kind, 8, "shared")[0] for name, kind in shared.items()}
    after = (1, 2, 3, 4, 8)
    others = [(name, *(f"{found[number - 1]:.3f}" for number in after)) for name, found in values.items()]
    return "\n\n".join(
        [
            table(("updates to a gap of", *(f"{bar:g}" for bar in bars)), rows, right=True),
            table(("J with shared weights after", *map(str, after)), others, right=True),
        ]
    )


def main() -> None:
    """Trains what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/optimizers"), help="folder (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=4.5, help="of each run (default %(default)s)")
    parser.add_argument("--seeds", default="0,1", help="separated by commas (default %(default)s)")
    parser.add_argument("--only", default=",".join(METHODS), help="methods, separated by commas (default all)")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--chain", action="store_true", help="the exact chain instead")
    options = parser.parse_args()
    if options.chain:
        print(chain())
        return
    runs: dict[str, list[Path]] = {name: [] for name in options.only.split(",")}
    for seed in options.seeds.split(","):
        for name in runs:
            run = options.output / f"{name.replace(' ', '-')}-{seed}"
            if not options.report:
                run = train(name, options.output, seed=int(seed), minutes=options.minutes)
            if run.is_dir():
                runs[name].append(run)
    print(report(runs, minutes=options.minutes))


if __name__ == "__main__":
    main()
