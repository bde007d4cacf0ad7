"""Trains `shapes` for small JPEG files, held by nothing, the KL, or a term of `regularization`, and reads what is lost.

python scripts/compare_forgetting.py [STUDY] [--output runs/forgetting] [--only kl,ewc] [--report] [--docs]

A study (`scripts/forgetting.yaml`) names a shipped configuration, overrides of all runs and of each, and measures of
their evaluations. Finished runs are kept and stopped ones resumed, so that the same command goes on where it was;
`--report` trains nothing. The table reads every run at the *same reward*: the highest that all runs reached, between
the two evaluations of a run beside it, linearly. Changes since the start are paired image by image; their errors are
over the captions of the evaluation, of the nearer of the two evaluations. `--docs` puts the table between the marks of
docs/forgetting.md, and the figure into docs/images.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.compare_algorithms import SUMMARY, tokens, train
from trainers.analysis.pareto import COLOURS, Course, Point, read_course

STUDY = Path(__file__).with_name("forgetting.yaml")
DOCS = Path(__file__).parents[1] / "docs"
PICTURE = "forgetting.png"
MARKS = "<!-- measured by scripts/compare_forgetting.py -->", "<!-- end of what was measured -->"
REWARD, KL = "reward", "kl (nats)"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A measure of a run at some reward.

    Attributes:
        value: The measure.
        error: Standard error of its paired change since the start; None where there is none.
    """

    value: float
    error: float | None


def read_at(course: Course, reward: float) -> Reading | None:
    """What a run's measure (y) is where its reward (x) first reaches a value; None where it never does.

    Args:
        course: Evaluations, x the reward.
        reward: To read at.
    """
    for before, after in zip(course.points, course.points[1:], strict=False):
        low, high = before.x.mean, after.x.mean
        if low <= reward <= high and high > low:
            share = (reward - low) / (high - low)
            nearer = after if share > 0.5 else before
            return Reading(value=(1 - share) * before.y.mean + share * after.y.mean, error=nearer.y.error)
    return None


def common_reward(courses: Sequence[Course]) -> float:
    """The highest reward that all runs reached."""
    return min(max(point.x.mean for point in course.points) for course in courses)


def report(runs: Mapping[str, Path], study: Mapping[str, Any]) -> str:
    """The table, in Markdown."""
    measures: dict[str, str] = {**study["measures"], KL: "path KL (nats)"}
    courses = {name: {m: read_course(run, REWARD, m) for m in measures} for name, run in runs.items()}
    some = next(iter(measures))
    reward = common_reward([by[some] for by in courses.values()])
    first = next(iter(courses.values()))
    start = ["*before*", f"{first[some].points[0].x.mean:.3f}", *(f"{first[m].points[0].y.mean:.3g}" for m in measures)]
    rows = [tuple(start)]
    for name, by in courses.items():
        cells = [_cell(read_at(by[m], reward)) for m in measures]
        rows.append((name, f"{max(point.x.mean for point in by[some].points):.3f}", *cells))
    head = ("held by", "highest reward", *measures.values())
    lines = ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows)]
    captions = study["overrides"]["evaluation.num_prompts"]
    return "\n".join([f"At reward {reward:.3f}; ± one standard error of the paired change since the start, over "
                      f"{captions} captions:", "", *lines])  # fmt: skip


def _cell(reading: Reading | None) -> str:
    if reading is None:
        return "not reached"
    return f"{reading.value:.3g}" + ("" if reading.error is None else f" ± {reading.error:.2g}")


def draw(runs: Mapping[str, Path], study: Mapping[str, Any]) -> Figure:
    """Each drawn measure against the reward, a line a run, its evaluations as points."""
    drawn = study["drawn"]
    figure = Figure(figsize=(4.2 * len(drawn), 3.8), dpi=120, layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for number, (name, run) in enumerate(runs.items()):
            points = read_course(run, REWARD, measure).points
            x, y, errors = zip(*map(_place, points), strict=True)
            colour = COLOURS[number % len(COLOURS)]
            axes.errorbar(x, y, yerr=errors, color=colour, marker="o", markersize=3, linewidth=1.2, label=name)
        axes.set_xlabel("reward")
        axes.set_title(study["measures"][measure], fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, title="held by")
    return figure


def _place(point: Point) -> tuple[float, float, float]:
    return point.x.mean, point.y.mean, point.y.error or 0.0


def arguments(study: Mapping[str, Any], name: str) -> list[str]:
    """Of `ddpo train`, for a run of the study."""
    return [study["config"], *tokens({**study["overrides"], **study["runs"][name], "run.name": name})]


def main() -> None:
    """Reads the arguments, trains, and writes what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?", default=STUDY, help="default %(default)s")
    parser.add_argument("--output", type=Path, default=Path("runs/forgetting"), help="default %(default)s")
    parser.add_argument("--only", default="", help="train these alone, comma between")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--docs", action="store_true", help="put table and figure into docs")
    options = parser.parse_args()
    study = yaml.safe_load(options.study.read_text(encoding="utf-8"))
    output = options.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    wanted = set(filter(None, options.only.split(","))) or set(study["runs"])
    if unknown := wanted - set(study["runs"]):
        parser.error(f"--only names {', '.join(sorted(unknown))}, the study has {', '.join(study['runs'])}")
    for name in study["runs"] if not options.report else ():
        if name in wanted:
            train(arguments(study, name), output / name)
    runs = {name: output / name for name in study["runs"] if (output / name / SUMMARY).is_file()}
    if not runs:
        parser.error(f"no run has finished in {output}")
    text, figure = report(runs, study), draw(runs, study)
    print(text)
    (output / "table.md").write_text(text + "\n", encoding="utf-8")
    figure.savefig(output / PICTURE)
    if options.docs:
        figure.savefig(DOCS / "images" / PICTURE)
        file = DOCS / "forgetting.md"
        before, _, rest = file.read_text(encoding="utf-8").partition(MARKS[0])
        file.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
