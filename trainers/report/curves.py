"""The charts of a report: every number of the metrics by epoch, reward against KL, distributions, steps by epoch."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trainers.evaluation.evaluator import KL
from trainers.report.charts import Band, Line, heat_map, line_chart
from trainers.report.marks import colour
from trainers.report.subject import Subject
from trainers.tracking.first_look import drawn

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_COUNTS = ("epoch", "samples", "updates")
_COLUMNS = 300  # of a heat map; of more epochs some are left out
_PATH = ("kl/path_nats", "kl/conditional_path_nats")


def first_curves(subjects: Sequence[Subject]) -> str:
    """What is looked at first."""
    return _charts(subjects, drawn(_keys(subjects)))


def other_curves(subjects: Sequence[Subject]) -> str:
    """Every other number there is, whatever algorithm wrote it."""
    known = _keys(subjects)
    shown = {*drawn(known), *_COUNTS}
    return _charts(subjects, [key for key in known if key not in shown and not key.endswith("_se")])


def _rows(subject: Subject) -> list[Mapping[str, object]]:
    return [*subject.course.rows, *subject.course.evaluation_rows]


def _keys(subjects: Sequence[Subject]) -> list[str]:
    """Names of the numbers, in the order in which they are met."""
    found = {
        key: None
        for subject in subjects
        for row in _rows(subject)
        for key, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return list(found)


def _charts(subjects: Sequence[Subject], keys: Iterable[str]) -> str:
    charts = (line_chart([_curve(subject, i, key) for i, subject in enumerate(subjects)], title=key) for key in keys)
    return _grid(charts)


def _grid(charts: Iterable[str]) -> str:
    body = "".join(charts)
    return f'<div class="charts">{body}</div>' if body else ""


def _curve(subject: Subject, index: int, key: str) -> Line:
    """A number by epoch with its standard error, where it has one."""
    rows = [row for row in _rows(subject) if isinstance(row.get(key), int | float)]
    errors = [_number(row.get(f"{key}_se")) for row in rows]
    x, y = [_number(row["epoch"]) for row in rows], [_number(row[key]) for row in rows]
    return Line.with_errors(label=subject.name, colour=colour(index), x=x, y=y, errors=errors)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def reward_against_kl(subjects: Sequence[Subject]) -> str:
    """Two paths: of the epochs, and of the evaluations."""
    training = [_path(subject, i, _epoch_points) for i, subject in enumerate(subjects)]
    evaluated = [_path(subject, i, _evaluation_points) for i, subject in enumerate(subjects)]
    return _grid(
        line_chart(lines, title=title, x_label="path KL, nats", whole=False)
        for title, lines in (("reward/mean, in training", training), ("eval/reward, on the fixed set", evaluated))
    )


def _path(subject: Subject, index: int, points: Callable[[Subject], list[tuple[float, float]]]) -> Line:
    found = points(subject)
    return Line(label=subject.name, colour=colour(index), x=[x for x, _ in found], y=[y for _, y in found])


def _epoch_points(subject: Subject) -> list[tuple[float, float]]:
    rows = subject.course.rows
    name = next((key for key in _PATH if any(row.get(key) is not None for row in rows)), "")
    return [
        (_number(row[name]), _number(row["reward/mean"]))
        for row in rows
        if row.get(name) is not None and row.get("reward/mean") is not None
    ]


def _evaluation_points(subject: Subject) -> list[tuple[float, float]]:
    return [
        (float(values[KL].double().mean()), float(values["reward"].double().mean()))
        for values in subject.values.values()
        if KL in values and "reward" in values
    ]


def distributions(subjects: Sequence[Subject]) -> str:
    """The reward of single images over time: on the fixed set by quantiles, in training by its deviation."""
    charts = []
    for index, subject in enumerate(subjects):
        of = f" of {subject.name}" if len(subjects) > 1 else ""
        title = f"eval/reward{of}: median, half and 90% of the images"
        charts.append(line_chart([_quantiles(subject, index)], title=title))
        charts.append(line_chart([_deviations(subject, index)], title=f"reward/mean{of} ± reward/std"))
    return _grid(charts)


def _quantiles(subject: Subject, index: int) -> Line:
    found = {epoch: values["reward"].double().numpy() for epoch, values in subject.values.items() if "reward" in values}
    by_level = [[float(np.quantile(values, level)) for values in found.values()] for level in _QUANTILES]
    bands: list[Band] = [(by_level[0], by_level[4]), (by_level[1], by_level[3])]
    return Line(label=subject.name, colour=colour(index), x=list(found), y=by_level[2], bands=bands)


def _deviations(subject: Subject, index: int) -> Line:
    rows = [row for row in subject.course.rows if row.get("reward/mean") is not None]
    mean, std = ([_number(row.get(f"reward/{name}")) for row in rows] for name in ("mean", "std"))
    band = ([m - s for m, s in zip(mean, std, strict=True)], [m + s for m, s in zip(mean, std, strict=True)])
    x = [_number(row["epoch"]) for row in rows]
    return Line(label=subject.name, colour=colour(index), x=x, y=mean, bands=[band])


def step_maps(subjects: Sequence[Subject]) -> str:
    """Each number that is logged by denoising step, over epochs, by one scale of colours for all runs."""
    names = {
        key: None for subject in subjects for row in subject.course.rows for key in row if key.startswith("per_step/")
    }
    return _grid(part for name in names for part in _maps(subjects, name))


def _maps(subjects: Sequence[Subject], name: str) -> list[str]:
    tables = {subject.name: _by_step(subject, name) for subject in subjects}
    tables = {run: found for run, found in tables.items() if np.isfinite(found[1]).any()}
    if not tables:
        return []
    span = (
        min(float(np.nanmin(values)) for _, values in tables.values()),
        max(float(np.nanmax(values)) for _, values in tables.values()),
    )
    several = len(subjects) > 1
    return [
        heat_map(values, title=f"{name}, {run}" if several else name, epochs=(epochs[0], epochs[-1]), span=span)
        for run, (epochs, values) in tables.items()
    ]


def _by_step(subject: Subject, name: str) -> tuple[list[float], NDArray[np.float64]]:
    """Epochs, and the values (T, N) of those that have any."""
    rows = [row for row in subject.course.rows if isinstance(row.get(name), list)]
    rows = rows[:: max(1, math.ceil(len(rows) / _COLUMNS))]
    steps = max((len(row[name]) for row in rows), default=0)  # type: ignore[arg-type]
    values = np.full((steps, len(rows)), np.nan)
    for column, row in enumerate(rows):
        found = [_number(value) for value in row[name]]  # type: ignore[attr-defined]
        values[: len(found), column] = found
    return [_number(row["epoch"]) for row in rows], values
