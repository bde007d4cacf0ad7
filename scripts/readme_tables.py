"""The tables of README and docs, from run folders, so that nobody copies numbers by hand.

python scripts/readme_tables.py comparison runs/demo
python scripts/readme_tables.py changes runs/seed0 runs/seed1 --column reward --column jpeg_compressibility=kB \
    --column "heldout/shapes_strict=strict accuracy:points" --column "kl (nats)=path KL (nats):last"
ddpo verify --slow --json found.json; python scripts/readme_tables.py verified found.json

`comparison` is the block of the first and the last evaluation. `changes` is a Markdown table, a row a run, of paired
changes since the first evaluation: `MEASURE[=HEADING][:FORMAT]`, where `points` is in hundredths and `last` the last
mean. Errors are those of captions like the evaluation's (`trainers.evaluation.statistics`). `verified` is the README's
excerpt of what `ddpo verify` found: the rows of `EXCERPT`, without their seconds.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ddpo.control.checks.base import Measurement
from ddpo.validation import UserError
from rewards import WeightedSum
from rewards.tools.table import aligned
from trainers.config.io import load_config
from trainers.epoch.report import comparison
from trainers.evaluation.evaluator import Evaluation, Evaluator, evaluation_prompts
from trainers.evaluation.overoptimisation import read_captions, read_values
from trainers.evaluation.statistics import Measure
from trainers.parallel.processes import Processes
from trainers.run_folder.folder import CONFIG, RunFolder
from trainers.tracking.progress import Progress
from trainers.verification.suite import HEADER, Row, cells

EXCERPT = (
    ("tabular: spaceship policies", "v*"),
    ("lqr: Riccati", "K"),
    ("merton: constants", "consumption rate"),
    ("hjb: collocation", "gain, relative"),
    ("model_free: LSPI", "gain after Richardson, relative"),
    ("soc: DeepBSDE", "u(0, 0) by quadrature"),
    ("chain: optimum", "J of the optimal policy"),
    ("chain: verification identity", "J of a random policy"),
    ("advantages: alpha", "Gaussian rewards, G 2, 4, 8"),
    ("gradient: DDIM", "REINFORCE"),
    ("gradient: DDIM", "PPO, joint ratio, groups"),
    ("gradient: shared weights, pretrained last step", "REINFORCE at 6 weights"),
    ("trainer: optimum, DDIM", "REINFORCE, 409,600 paths"),
    ("trainer: optimum, DDIM, PPO", "PPO, 409,600 paths"),
    ("trainer: optimum, flow SDE", "REINFORCE, 409,600 paths"),
    ("trainer: optimum, mixture", "PPO, 614,400 paths"),
)
"""Check and what it measured, of the README's excerpt."""

Format = Literal["change", "points", "last"]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One measure of a table.

    Attributes:
        measure: Its name in the evaluations.
        heading: Of the column.
        form: How it is shown.
    """

    measure: str
    heading: str
    form: Format

    @classmethod
    def parse(cls, text: str) -> "Column":
        """From `MEASURE[=HEADING][:FORMAT]`."""
        named, colon, form = text.rpartition(":")
        named, form = (named, form) if colon and form in ("change", "points", "last") else (text, "change")
        measure, _, heading = named.partition("=")
        return cls(measure=measure, heading=heading or measure, form=form)  # type: ignore[arg-type]

    def cell(self, run: Path) -> str:
        """The measure of a run."""
        folder = RunFolder.open(run)
        first, last = (folder.evaluated(folder.evaluated_epochs()[place]) for place in (0, -1))
        before, after = (read_values(file)[self.measure].double() for file in (first, last))
        if self.form == "last":
            return shown(float(after.mean()), digits=1)
        factor = 100 if self.form == "points" else 1
        change = Measure.of(factor * (after - before), read_captions(last))
        if change.error is None:
            return shown(change.mean, digits=3, sign=True)
        digits = decimals(change.error) if self.form == "change" else 1
        text = f"{shown(change.mean, digits=digits, sign=True)} ± {shown(change.error, digits=digits)}"
        if self.form == "points":
            return f"{text} points"
        return f"{text} ({abs(change.mean / change.error):.1f} SE)" if change.error else text


def decimals(error: float) -> int:
    """Places that show two digits of an error."""
    return max(0, 1 - math.floor(math.log10(error))) if error > 0 else 3


def shown(number: float, *, digits: int, sign: bool = False) -> str:
    """A number with so many places and no zero before the point."""
    text = f"{number:{'+' if sign else ''}.{digits}f}"
    return (
        text.replace("0.", ".", 1) if abs(number) < 1 and "." in text and text.lstrip("+-").startswith("0.") else text
    )


def changes(runs: list[Path], columns: list[Column]) -> str:
    """The Markdown table of some runs."""
    lines = [
        f"| run | epochs | {' | '.join(column.heading for column in columns)} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for run in runs:
        epochs = RunFolder.open(run).evaluated_epochs()[-1]
        lines.append(f"| {run.name} | {epochs} | {' | '.join(column.cell(run) for column in columns)} |")
    return "\n".join(lines)


def compared(run: Path) -> str:
    """The block of the first and the last evaluation of a run, with its rewards on the scales of the first."""
    folder = RunFolder.open(run)
    config = load_config(folder.path / CONFIG)
    evaluator = Evaluator(
        config.evaluation,
        evaluation_prompts(config),
        batch_size=config.batch.sample_batch_size,
        processes=Processes(device="cpu"),
        progress=Progress(enabled=False),
    )
    epochs = folder.evaluated_epochs()
    before, after = (Evaluation.load(folder.evaluated(epochs[place]), evaluator.texts) for place in (0, -1))
    with torch.no_grad():
        scales = before.scales(WeightedSum(config.terms))
    return comparison(*(one.rescored(scales, epoch=epochs[-1]) for one in (before, after)))


def verified(measurements: list[dict[str, Any]]) -> str:
    """The README's excerpt of the measurements that `ddpo verify --json` wrote, all of `EXCERPT` that are among them.

    Raises:
        UserError: A measurement of `EXCERPT` is missing although its check ran, so that it has another name by now.
    """
    found = {(row[0], row[1]): row for row in map(_measured, measurements)}
    checks = {check for check, _ in found}
    missing = [" ".join(one) for one in EXCERPT if one not in found and one[0] in checks]
    if missing:
        raise UserError(f"the checks no longer measure {', '.join(missing)}: name in EXCERPT what they do")
    columns = [HEADER.index(name) for name in ("check", "measured", "exact", "obtained", "error", "tolerance")]
    rows = [HEADER, *(found[one] for one in EXCERPT if one in found)]
    return "\n".join(aligned([[row[column] for column in columns] for row in rows]))


def _measured(values: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table that `ddpo verify` prints, from its JSON."""
    found = Measurement(
        name=values["measured"],
        exact=values["exact"],
        obtained=values["obtained"],
        error=float(values["error"]),
        tolerance=values["tolerance"],
    )
    return cells(
        Row(group=values["group"], check=values["check"], claim=values["claim"], measurement=found,
            seconds=values["seconds"])
    )  # fmt: skip


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True, dest="kind")
    one = kinds.add_parser("comparison", help="first against last evaluation")
    one.add_argument("runs", type=Path, nargs=1, metavar="RUN")
    several = kinds.add_parser("changes", help="a row a run")
    several.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    several.add_argument("--column", type=Column.parse, action="append", required=True, dest="columns")
    checked = kinds.add_parser("verified", help="the excerpt of ddpo verify")
    checked.add_argument("file", type=Path, metavar="JSON")
    options = parser.parse_args()
    if options.kind == "verified":
        print(verified(json.loads(options.file.read_text(encoding="utf-8"))["measurements"]))
    else:
        print(compared(options.runs[0]) if options.kind == "comparison" else changes(options.runs, options.columns))


if __name__ == "__main__":
    main()
