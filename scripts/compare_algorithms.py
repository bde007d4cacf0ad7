"""Trains `shapes` by several algorithms for equal minutes and compares what they reached, and at which KL.

python scripts/compare_algorithms.py [STUDY] [--output runs/algorithms] [--jobs 2] [--only ppo,rwr] [--report] [--docs]

A study (`scripts/algorithms.yaml`) names tasks (rewards, prompts), methods (a shipped configuration, overrides,
learning rates to try), minutes, and seeds. For each task and method the rate is the one whose short run on another seed
ends with the highest total; then every seed is trained at that rate. First seeds come first, so that an unfinished
study compares something. Each run has one thread; `--jobs` of them run at a time. Minutes are of its processor time
(`clock: process`), which a busy machine does not shorten. Finished runs are kept and stopped ones resumed, so that the
same command goes on where it was. Evaluations are on fixed prompts and seeds and do not count as training time.

`--report` trains nothing: it writes the tables of what there is and two pictures for each task (measures against
minutes and images; the total against the path KL) into the output folder. In the file's tables errors are over the
captions of an evaluation (`trainers.evaluation.statistics`), a row a seed. `--docs` also puts a row a method, with the
lowest and the highest seed, between the marks of docs/algorithms.md, and the pictures beside it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any

import yaml
from matplotlib.figure import Figure

from trainers.analysis.pareto import COLOURS, read_course
from trainers.evaluation.evaluator import KL
from trainers.run_folder.folder import read_metrics

STUDY = Path(__file__).with_name("algorithms.yaml")
SUMMARY = "summary.json"
DOCS = Path(__file__).parents[1] / "docs"
MARKS = "<!-- measured by scripts/compare_algorithms.py -->", "<!-- end of what was measured -->"


@dataclass(frozen=True, kw_only=True)
class Method:
    """An algorithm in a task.

    Attributes:
        task: Name of the task.
        name: Of the method.
        config: Shipped configuration, or a file.
        overrides: `--key value` tokens of the study, the task and the method.
        rates: Learning rates to try.
    """

    task: str
    name: str
    config: str
    overrides: tuple[str, ...]
    rates: tuple[float, ...]

    def arguments(self, *, name: str, seed: int, rate: float, minutes: float, every: int = 0) -> list[str]:
        """Of `ddpo train` for one run, evaluated at the start, at the end and after every so many epochs (0: never)."""
        own = {
            "run.name": name,
            "seed": seed,
            "optimizer.learning_rate": rate,
            "max_minutes": minutes,
            "clock": "process",
            "evaluation.every_epochs": every,
        }
        return [self.config, *self.overrides, *tokens(own)]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared.

    Attributes:
        methods: Of all tasks.
        seeds: Of the runs that are compared.
        minutes: Of training, each.
        search_seed: Of the runs that choose a rate.
        search_minutes: Of training, each.
        evaluations: Of a run that is compared, about: the first, the last, and those between.
        measures: Per task, those that are drawn against time; the first is the one that chooses a rate.
    """

    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    minutes: float
    search_seed: int
    search_minutes: float
    evaluations: int
    measures: dict[str, tuple[str, ...]]

    @classmethod
    def read(cls, file: Path) -> "Study":
        """From YAML."""
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
        methods = tuple(
            Method(
                task=task,
                name=name,
                config=method["config"],
                overrides=tuple(
                    tokens(found["overrides"]) + tokens(options["overrides"]) + tokens(method.get("overrides", {}))
                ),
                rates=tuple(float(rate) for rate in method["rates"]),
            )
            for task, options in found["tasks"].items()
            for name, method in found["methods"].items()
            if name in options["methods"]
        )
        return cls(
            methods=methods,
            seeds=tuple(found["seeds"]),
            minutes=found["minutes"],
            search_seed=found["search_seed"],
            search_minutes=found["search_minutes"],
            evaluations=found["evaluations"],
            measures={task: tuple(options["measures"]) for task, options in found["tasks"].items()},
        )


Finished = tuple[Method, float, list[Path]]
"""A method, its rate, and the runs of its seeds that have ended."""


def tokens(values: dict[str, Any]) -> list[str]:
    """Command-line tokens of keys and values."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return [token for pair in texts.items() for token in ("--" + pair[0], pair[1])]


def run_name(method: Method, *, seed: int, rate: float) -> str:
    """Of a run's folder."""
    return f"{method.task}-{method.name}-rate{rate:g}-seed{seed}"


def train(arguments: Sequence[str], folder: Path) -> None:
    """Starts or resumes a run, with one thread, unless it has ended.

    Raises:
        RuntimeError: It failed; what it said is in `<folder>.log`.
    """
    if (folder / SUMMARY).is_file():
        return
    begun = (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir())
    told = ["--resume", str(folder)] if begun else [*arguments, "--run.output_dir", str(folder.parent)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    with folder.with_name(f"{folder.name}.log").open("a", encoding="utf-8") as log:
        command = [sys.executable, "-m", "trainers", "train", *told]
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    print(f"{folder.name}: {'done' if status == 0 else f'FAILED with status {status}, see {log.name}'}", flush=True)
    if status:
        raise RuntimeError(folder.name)


def total(run: Path, measure: str) -> float:
    """Mean of a measure at a run's last evaluation."""
    return read_course(run, measure, KL).points[-1].x.mean


def chosen_rate(method: Method, study: Study, output: Path) -> float | None:
    """The rate whose search run ended best; None while one is missing."""
    runs = {rate: output / run_name(method, seed=study.search_seed, rate=rate) for rate in method.rates}
    if not all((run / SUMMARY).is_file() for run in runs.values()):
        return None
    return max(runs, key=lambda rate: total(runs[rate], study.measures[method.task][0]))


def train_search(method: Method, study: Study, output: Path) -> float:
    """The short runs that choose a method's rate; returns it."""
    for rate in method.rates:
        name = run_name(method, seed=study.search_seed, rate=rate)
        minutes = study.search_minutes
        train(method.arguments(name=name, seed=study.search_seed, rate=rate, minutes=minutes), output / name)
    rate = chosen_rate(method, study, output)
    assert rate is not None
    return rate


def train_seed(method: Method, study: Study, output: Path, *, seed: int, lock: Lock) -> None:
    """A run that is compared, at the best rate, whose search comes first (of a method in one thread at a time)."""
    with lock:
        rate = train_search(method, study, output)
    last = read_metrics(output / run_name(method, seed=study.search_seed, rate=rate))[-1]
    epochs = 60 * study.minutes * float(last["epoch"]) / float(last["time/total_seconds"])
    every = max(1, round(epochs / (study.evaluations - 1)))
    name = run_name(method, seed=seed, rate=rate)
    train(method.arguments(name=name, seed=seed, rate=rate, minutes=study.minutes, every=every), output / name)


def train_all(study: Study, output: Path, *, wanted: set[str], jobs: int) -> list[str]:
    """All runs of the methods that are wanted, first seeds first; returns what failed."""
    methods = {method: Lock() for method in study.methods if not wanted or method.name in wanted}
    with ThreadPoolExecutor(jobs) as pool:
        results = [
            pool.submit(train_seed, method, study, output, seed=seed, lock=lock)
            for seed in study.seeds
            for method, lock in methods.items()
        ]
    return sorted({str(result.exception()) for result in results if result.exception()})


def finished(study: Study, output: Path) -> Iterator[Finished]:
    """Methods with a rate and at least one finished seed."""
    for method in study.methods:
        rate = chosen_rate(method, study, output)
        if rate is None:
            continue
        runs = [output / run_name(method, seed=seed, rate=rate) for seed in study.seeds]
        if runs := [run for run in runs if (run / SUMMARY).is_file()]:
            yield method, rate, runs


def by_task(study: Study, output: Path) -> dict[str, list[Finished]]:
    """Finished methods of each task that has any."""
    found = groupby(finished(study, output), key=lambda entry: entry[0].task)
    return {task: list(entries) for task, entries in found}


def report(study: Study, output: Path) -> str:
    """Markdown tables, a task each and a row a seed; writes the pictures."""
    blocks = []
    for task, methods in by_task(study, output).items():
        measures = study.measures[task]
        shown = [*measures, KL]
        lines = header("method", "rate", "seed", "minutes", "epochs", "images", *shown)
        start = [f"{first(methods, name):.3f}" for name in shown]
        lines.append(row("*pretrained*", "", "", "", "", "", *start))
        for method, rate, runs in methods:
            for run in runs:
                last = read_metrics(run)[-1]
                cells = [str(read_course(run, name, KL).points[-1].x) for name in shown]
                spent = [f"{float(last['time/total_seconds']) / 60:.1f}", f"{last['epoch']:g}", f"{last['samples']:g}"]
                lines.append(row(method.name, f"{rate:g}", run.name.rpartition("seed")[2], *spent, *cells))
        blocks.append(f"### {task}\n\n" + "\n".join(lines))
        against_time(methods, measures).savefig(output / f"{task}_curves.png")
        against_kl(methods, measures[0]).savefig(output / f"{task}_kl.png")
    return "\n\n".join(blocks)


def summary(study: Study, output: Path) -> str:
    """Markdown for the documentation: a row a method, the mean of its seeds and, of several, the lowest and highest."""
    blocks = []
    for task, methods in by_task(study, output).items():
        shown = [*study.measures[task], KL]
        lines = header("method", "rate", "seeds", "minutes", "images", *shown)
        start = [f"{first(methods, name):.3f}" for name in shown]
        lines.append(row("*pretrained*", "", "", "", "", *start))
        for method, rate, runs in methods:
            last = [read_metrics(run)[-1] for run in runs]
            spent = [
                spread([float(line["time/total_seconds"]) / 60 for line in last], digits=1),
                spread([float(line["samples"]) for line in last], digits=0),
            ]
            ends = [spread([total(run, name) for run in runs], digits=3) for name in shown]
            lines.append(row(method.name, f"{rate:g}", str(len(runs)), *spent, *ends))
        pictures = [f"![{task}, {kind}](images/algorithms_{task}_{kind}.png)" for kind in ("curves", "kl")]
        blocks.append("\n".join([f"**Task `{task}`**", "", *lines, "", *pictures]))
    return "\n\n".join(blocks)


def spread(values: Sequence[float], *, digits: int) -> str:
    """The mean and, of values that differ as shown, the lowest and the highest."""
    mean, low, high = (f"{x:.{digits}f}" for x in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def first(methods: Sequence[Finished], measure: str) -> float:
    """A measure of the pretrained model."""
    return read_course(methods[0][2][0], measure, KL).points[0].x.mean


def header(*cells: str) -> list[str]:
    """The first two lines of a Markdown table."""
    return [row(*cells), "|---" * len(cells) + "|"]


def row(*cells: str) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def write_docs(study: Study, output: Path, docs: Path) -> None:
    """Puts the summary between the marks of the documentation's page, and the pictures, which `report` drew, beside it.

    Raises:
        ValueError: The page lacks a mark.
    """
    page, (begin, end) = docs / "algorithms.md", MARKS
    text = page.read_text(encoding="utf-8")
    if not 0 <= text.find(begin) < text.find(end):
        raise ValueError(f"{page} needs the lines {begin!r} and {end!r}, in this order")
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    page.write_text(f"{before}\n{summary(study, output)}\n{after}", encoding="utf-8")
    for task in by_task(study, output):
        for kind in ("curves", "kl"):
            shutil.copyfile(output / f"{task}_{kind}.png", docs / "images" / f"algorithms_{task}_{kind}.png")


def against_time(methods: Sequence[Finished], measures: Sequence[str]) -> Figure:
    """A row of panels against minutes and one against images; a thin line a seed, in the method's colour."""
    axis = (("minutes of a core", "time/total_seconds", 60.0), ("images", "samples", 1.0))
    figure = Figure(figsize=(4.2 * len(measures), 6.2), dpi=130, layout="constrained")
    panels = figure.subplots(2, len(measures), squeeze=False)
    for (label, key, unit), row in zip(axis, panels, strict=True):
        for measure, axes in zip(measures, row, strict=True):
            for number, (method, _, runs) in enumerate(methods):
                for place, run in enumerate(runs):
                    reached = {int(line["epoch"]): float(line[key]) / unit for line in read_metrics(run)}
                    points = read_course(run, measure, KL).points
                    axes.plot(
                        [reached.get(point.epoch, 0.0) for point in points],
                        [point.x.mean for point in points],
                        color=COLOURS[number % len(COLOURS)],
                        linewidth=1.2,
                        label=method.name if place == 0 else None,
                    )
            axes.set(title=measure, xlabel=label)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(frameon=False, fontsize=7)
    return figure


def against_kl(methods: Sequence[Finished], measure: str) -> Figure:
    """A measure against the path KL: a line from the pretrained model to a seed's last evaluation, with its errors."""
    figure = Figure(figsize=(7, 4.8), dpi=130, layout="constrained")
    axes = figure.subplots()
    for number, (method, _, runs) in enumerate(methods):
        colour = COLOURS[number % len(COLOURS)]
        for place, run in enumerate(runs):
            points = read_course(run, KL, measure).points
            axes.plot([p.x.mean for p in points], [p.y.mean for p in points], color=colour, linewidth=1, alpha=0.6)
            last = points[-1]
            label = method.name if place == 0 else None
            axes.errorbar(
                last.x.mean, last.y.mean, xerr=last.x.error, yerr=last.y.error, fmt="s", markersize=5, color=colour,
                label=label,
            )  # fmt: skip
    axes.set(xlabel=KL, ylabel=measure)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    """Trains what is missing, then reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?", default=STUDY, help="YAML file (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/algorithms"), help="folder (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core each (default %(default)s)")
    parser.add_argument("--only", default="", help="methods, separated by commas (default all)")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--docs", action="store_true", help="also write docs/algorithms.md and its pictures")
    options = parser.parse_args()
    study = Study.read(options.study)
    wanted = set(filter(None, options.only.split(",")))
    if unknown := wanted - {method.name for method in study.methods}:
        parser.error(f"--only: the study has no {', '.join(sorted(unknown))}")
    options.output.mkdir(parents=True, exist_ok=True)
    failed = [] if options.report else train_all(study, options.output, wanted=wanted, jobs=options.jobs)
    text = report(study, options.output)
    (options.output / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    if options.docs:
        write_docs(study, options.output, DOCS)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
