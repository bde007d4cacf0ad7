"""Compares runs that weigh several rewards differently: which of them no other run beats in both of two measures.

A point is an evaluation: the means of two measures over its fixed prompts. One point dominates another if it is at
least as high in both and higher in one (`kl (nats)` is to be small, all others large). The front is made of the runs'
last evaluations and the pretrained model, which is the first evaluation of each. Runs are compared on the same prompts
and seeds; the error of a point is that of its paired change since the start, image by image, so that what is common to
all runs does not count, and pictures of a caption as one draw. Points closer than their errors dominate each other by
chance.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ddpo.validation import UserError
from rewards.tools.table import table
from trainers.config import Config
from trainers.config.io import load_config
from trainers.evaluation.evaluator import KL
from trainers.evaluation.overoptimisation import read_captions, read_values
from trainers.evaluation.statistics import Measure
from trainers.run_folder.folder import RunError, RunFolder
from trainers.run_folder.writable import check_file, check_folder

PICTURES = (".png", ".pdf", ".svg")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


@dataclass(frozen=True, kw_only=True)
class Point:
    """An evaluation of a run.

    Attributes:
        epoch: Finished epochs.
        x: The first measure: its mean, and the standard error of its paired change since the first evaluation.
        y: The second measure, likewise.
    """

    epoch: int
    x: Measure
    y: Measure


@dataclass(frozen=True, kw_only=True)
class Course:
    """A run's evaluations, oldest first.

    Attributes:
        run: Name of the run.
        points: At least one.
    """

    run: str
    points: tuple[Point, ...]


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Which of the points (N, M) no other one dominates, (N,); more is better, equal points do not dominate."""
    values = np.asarray(points, dtype=np.float64)
    at_least = (values[:, None] >= values[None]).all(-1)
    higher = (values[:, None] > values[None]).any(-1)
    return np.logical_not((at_least & higher).any(axis=0))


def read_course(run: Path, x: str, y: str) -> Course:
    """The evaluations of a run folder.

    Raises:
        RunError: It has none, or none with these measures; the message lists what there is.
    """
    folder = RunFolder.open(run)
    points: list[Point] = []
    start: dict[str, Tensor] = {}
    for epoch in folder.evaluated_epochs():
        values = read_values(folder.evaluated(epoch))
        start = start or values
        unknown = [name for name in (x, y) if name not in values]
        if unknown:
            raise RunError(f"{run} has no measure {unknown[0]!r}; it has {', '.join(sorted(values))}")
        captions = read_captions(folder.evaluation(epoch))
        changes = [Measure.of(values[name] - start[name], captions) for name in (x, y)]
        at, up = (
            Measure(mean=float(values[name].double().mean()), error=change.error)
            for name, change in zip((x, y), changes, strict=True)
        )
        points.append(Point(epoch=epoch, x=at, y=up))
    if not points:
        raise RunError(f"{run} has no evaluation yet")
    return Course(run=folder.name, points=tuple(points))


def default_measures(config: Config) -> tuple[str, str]:
    """The first reward and the second, or the first held-out one, by the names under which evaluations report them.

    Raises:
        UserError: There is only one reward.
    """
    names = [_reported(term.shown) for term in config.rewards]
    names += [f"heldout/{_reported(term.shown)}" for term in config.heldout_rewards]
    if len(names) < 2:
        raise UserError(f"a front needs two measures, and the runs have only {names[0]}; name them by --x and --y")
    return names[0], names[1]


def compare(courses: Sequence[Course], x: str, y: str) -> tuple[list[str], list[Point], NDArray[np.bool_]]:
    """Names, last points and membership of the front: the pretrained model first, then each run."""
    names = ["pretrained", *(course.run for course in courses)]
    points = [courses[0].points[0], *(course.points[-1] for course in courses)]
    signs = [-1 if measure == KL else 1 for measure in (x, y)]
    return names, points, non_dominated([[signs[0] * point.x.mean, signs[1] * point.y.mean] for point in points])


def report(runs: Sequence[Path], *, x: str | None, y: str | None, out: Path) -> str:
    """Writes the figure and, beside it, the same as JSON.

    Args:
        runs: Run folders.
        x: Measure of the horizontal axis; None takes the first run's first reward.
        y: Of the vertical axis; None takes its second reward, or its first held-out one.
        out: Picture to write; see `check_picture`.

    Returns:
        A table for people.
    """
    if not runs:
        raise UserError("no runs given; name run folders, or launch some with --sweep CONFIG --weights NAME=0,1,5")
    if x is None or y is None:
        defaults = default_measures(load_config(RunFolder.open(runs[0]).config_file))
        x, y = x or defaults[0], y or defaults[1]
    x, y = (KL if name == "kl" else name for name in (x, y))
    courses = [read_course(run, x, y) for run in runs]
    names, points, front = compare(courses, x, y)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(courses, x, y).savefig(out)
    record = {
        "x": x,
        "y": y,
        "front": [name for name, is_on in zip(names, front, strict=True) if is_on],
        "runs": {course.run: [_plain(point) for point in course.points] for course in courses},
    }
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    rows = [
        [name, str(point.epoch), str(point.x), str(point.y), "front" if is_on else ""]
        for name, point, is_on in zip(names, points, front, strict=True)
    ]
    where = f"picture: {out}\nnumbers: {out.with_suffix('.json')}"
    return f"{table(['run', 'epoch', x, y, ''], rows)}\n{_comparability(courses)}\n{where}"


def check_picture(out: Path) -> None:
    """Refuses a picture that cannot be written or is not a `.png`, `.pdf` or `.svg`.

    Raises:
        UserError: It cannot be written, or has another suffix.
    """
    if out.suffix not in PICTURES:
        raise UserError(f"--out must end in {', '.join(PICTURES)}, got {out}")
    check_folder("--out", out.parent)
    for file in (out, out.with_suffix(".json")) if out.parent.is_dir() else ():
        check_file("--out", file)


def draw(courses: Sequence[Course], x: str, y: str) -> Figure:
    """The runs' paths from the pretrained model to their last evaluations, and the front of these as a staircase."""
    figure = Figure(figsize=(7, 4.8), dpi=130, layout="constrained")
    axes = figure.subplots()
    for index, course in enumerate(courses):
        draw_course(axes, course, colour=COLOURS[index % len(COLOURS)], label=course.run)
    _, points, front = compare(courses, x, y)
    start = points[0]
    axes.plot(start.x.mean, start.y.mean, "*", color="black", markersize=11, label="pretrained", zorder=5)
    best = sorted((p.x.mean, p.y.mean) for p, is_on in zip(points, front, strict=True) if is_on)
    where = "post" if x == KL else "pre"
    axes.step([a for a, _ in best], [b for _, b in best], where=where, color="black", linewidth=0.8, linestyle=":",
              label="front", zorder=1)  # fmt: skip
    label_axes(axes, x, y)
    axes.legend(frameon=False, fontsize=8)
    return figure


def draw_course(axes: Axes, course: Course, *, colour: str, label: str) -> None:
    """A run's path from its first evaluation to its last one, which has its standard errors."""
    along, up = [point.x.mean for point in course.points], [point.y.mean for point in course.points]
    axes.plot(along, up, "-", color=colour, linewidth=1, alpha=0.6)
    axes.plot(along[1:-1], up[1:-1], "o", color=colour, markersize=3, alpha=0.6)
    last = course.points[-1]
    axes.errorbar(
        last.x.mean, last.y.mean, xerr=last.x.error, yerr=last.y.error, fmt="s", color=colour, markersize=5,
        elinewidth=1, capsize=2, label=label,
    )  # fmt: skip


def label_axes(axes: Axes, x: str, y: str) -> None:
    """The measures' names, and which way is better."""
    axes.set(xlabel=_axis(x), ylabel=_axis(y))
    axes.spines[["top", "right"]].set_visible(False)


def _comparability(courses: Sequence[Course]) -> str:
    """A warning where runs did not start from the same measurement; empty where they did."""
    starts = [(course.points[0].x.mean, course.points[0].y.mean) for course in courses]
    if np.allclose(starts, starts[0], rtol=1e-5):
        return ""
    return (
        "\nWARNING: the runs' first evaluations differ: other models, prompts, seeds or samplers; do not compare them\n"
    )


def _reported(spec: str) -> str:
    """`name` of `file.py:name`."""
    return spec.rpartition(":")[2]


def _axis(measure: str) -> str:
    return f"{measure} (less is better)" if measure == KL else f"{measure} (more is better)"


def _plain(point: Point) -> dict[str, object]:
    return {"epoch": point.epoch, "x": vars(point.x), "y": vars(point.y)}
