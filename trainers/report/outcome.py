"""The tables of a report: findings, evaluations with paired differences, seconds and cost."""

from collections.abc import Mapping, Sequence
from html import escape

import torch

from trainers.diagnosis.finding import Finding
from trainers.evaluation.statistics import Measure, population
from trainers.report.marks import number, paragraph, run_label, table
from trainers.report.subject import Subject

_APART = 1e-5  # relative; first evaluations further apart than that are of another set, seed or model


def findings(subjects: Sequence[Subject]) -> str:
    """What the doctor says of each run."""
    parts = []
    for index, subject in enumerate(subjects):
        name = run_label(subject.name, index) if len(subjects) > 1 else ""
        parts.append(name + "".join(map(_finding, subject.findings)))
    return "".join(parts)


def _finding(finding: Finding) -> str:
    first, *rest = (escape(line.removeprefix(finding.verdict).strip()) for line in finding.lines())
    return f'<div class="finding {finding.verdict}"><b>{finding.verdict}</b> {"<br>".join([first, *rest])}</div>'


def evaluations(subjects: Sequence[Subject]) -> str:
    """Every measure at start and end, and the paired difference; of several runs that, and the one to the first run."""
    evaluated = [subject for subject in subjects if subject.values]
    if not evaluated:
        return paragraph("There is no evaluation yet.")
    if len(subjects) == 1:
        return _single(evaluated[0])
    header = ["", *(f"{subject.name}, since its start" for subject in evaluated)]
    comparable = [_start_alike(evaluated[0], subject) for subject in evaluated]
    compared = [subject for subject, alike in zip(evaluated, comparable, strict=True) if alike][1:]
    header += [f"{subject.name} – {evaluated[0].name}" for subject in compared]
    rows = [
        (
            measure,
            *(_signed(subject.change(measure)) for subject in evaluated),
            *(_signed(_between(evaluated[0], subject, measure)) for subject in compared),
        )
        for measure in _measures(evaluated)
    ]
    body = table(header, rows) + _errors(evaluated[0])
    if not all(comparable):
        others = ", ".join(s.name for s, alike in zip(evaluated, comparable, strict=True) if not alike)
        body += paragraph(
            f"{others}: the first evaluation is not that of {evaluated[0].name} (another model, other prompts, seeds "
            "or sampler); do not compare these numbers",
            "warning",
        )
    return body


def _measures(subjects: Sequence[Subject]) -> list[str]:
    return list(dict.fromkeys(name for subject in subjects for name in subject.course.measures))


def _single(subject: Subject) -> str:
    first, last = min(subject.values), max(subject.values)
    rows = []
    for measure in _measures([subject]):
        change = subject.change(measure)
        shown = (subject.mean(measure, first), subject.mean(measure, last))
        rows.append((measure, *map(_plain, shown), _signed(change), "" if change is None else change.in_errors))
    return table(("", f"epoch {first}", f"epoch {last}", "difference", "in SE"), rows) + _errors(subject)


def _errors(subject: Subject) -> str:
    """What the standard errors speak of."""
    assert subject.captions is not None
    return paragraph(population([str(caption) for caption in subject.captions.tolist()]))


def _plain(measure: Measure | None) -> str:
    return "–" if measure is None else str(measure)


def _signed(measure: Measure | None) -> str:
    return "–" if measure is None else measure.signed


def _start_alike(one: Subject, other: Subject) -> bool:
    """Whether two runs were first evaluated on the same pictures with the same outcome."""
    if one.texts != other.texts:
        return False
    starts = [subject.values[min(subject.values)] for subject in (one, other)]
    shared = starts[0].keys() & starts[1].keys()
    return bool(shared) and all(
        torch.allclose(starts[0][name], starts[1][name], rtol=_APART, atol=_APART, equal_nan=True) for name in shared
    )


def _between(one: Subject, other: Subject, measure: str) -> Measure | None:
    """The paired difference of the last evaluations of two runs on the same pictures."""
    ends = [subject.values[max(subject.values)].get(measure) for subject in (one, other)]
    if ends[0] is None or ends[1] is None or one.captions is None:
        return None
    return Measure.of(ends[1] - ends[0], one.captions)


def times(subjects: Sequence[Subject]) -> str:
    """Where the time went, and what a run has taken."""
    return "".join(_time(subject, i, several=len(subjects) > 1) for i, subject in enumerate(subjects))


def _time(subject: Subject, index: int, *, several: bool) -> str:
    rows = subject.course.rows
    if not rows:
        return ""
    phases = {key: None for row in rows for key in row if key.startswith("seconds/")}
    seconds = {key.removeprefix("seconds/"): sum(subject.course.series(key)) for key in phases}
    total = sum(seconds.values()) or 1.0
    lines = "".join(
        f"<tr><th>{escape(phase)}</th><td>{number(spent / len(rows), 3)}</td><td>{spent / total:.0%}</td>"
        f'<td style="text-align:left"><span class="share" style="width:{160 * spent / total:.0f}px"></span></td></tr>'
        for phase, spent in sorted(seconds.items(), key=lambda pair: -pair[1])
    )
    head = "<tr><th>phase</th><th>seconds an epoch</th><th>share</th><th></th></tr>"
    shown = f'<div class="wide"><table><thead>{head}</thead><tbody>{lines}</tbody></table></div>' if seconds else ""
    name = run_label(subject.name, index) if several else ""
    return name + shown + paragraph(_cost(subject, rows[-1]))


def _cost(subject: Subject, last: Mapping[str, object]) -> str:
    device = subject.folder.environment().get("device") or {}
    names = ", ".join(map(str, device.get("names", []))) or "an unknown device"
    speed, memory = subject.course.series("images_per_second"), subject.course.series("memory_gib")
    parts = [
        f"{subject.summary.minutes / 60:.3g} hours of training on {names}",
        f"{number(last.get('samples'), 9)} images",
        *([f"{sum(speed) / len(speed):.3g} images a second"] if speed else []),
        *([f"at most {max(memory):.3g} GiB of memory"] if memory else []),
    ]
    return ", ".join(parts)
