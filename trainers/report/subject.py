"""A run as its report reads it: text files, and the values of its evaluations; no pipeline, no rewards."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from ddpo.validation import UserError
from trainers.config import Config
from trainers.config.io import to_plain
from trainers.diagnosis.course import Course, read_course
from trainers.diagnosis.doctor import verdicts
from trainers.diagnosis.finding import Finding
from trainers.evaluation.evaluator import chosen_prompts
from trainers.evaluation.overoptimisation import read_captions, read_values
from trainers.evaluation.statistics import Measure
from trainers.run_folder.folder import RunError, RunFolder
from trainers.run_folder.listing import RunSummary, list_runs
from trainers.run_folder.prompt_record import check_evaluated
from trainers.run_folder.python_runs import evaluation_source

PLACES = ("run.name", "run.output_dir")
"""Keys that tell runs apart without making them different."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A run.

    Attributes:
        folder: Where it is.
        summary: It at a glance.
        course: Its metrics and the records of its evaluations.
        findings: What the doctor says.
        values: Of its evaluations by epoch, rising: (E,) by measure, and (P,) for those of a prompt.
        captions: Numbers of the captions of the evaluation's images, (E,); None without evaluations.
        texts: The captions of the E images; numbered ones where the prompts cannot be read.
    """

    folder: RunFolder
    summary: RunSummary
    course: Course
    findings: tuple[Finding, ...]
    values: Mapping[int, Mapping[str, Tensor]]
    captions: Tensor | None
    texts: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the run."""
        return self.summary.name

    @property
    def ended(self) -> "Subject":
        """The same of a run that is about to end, and still holds its folder."""
        return replace(self, summary=replace(self.summary, state="finished"))

    @property
    def config(self) -> Config:
        """Of the run."""
        return self.course.config

    def image(self, epoch: int, index: int) -> Tensor:
        """One of the images of an evaluation, (3, H, W) in [0, 1]."""
        with safe_open(self.folder.evaluation(epoch), framework="pt") as file:
            return file.get_slice("images")[index : index + 1][0].float() / 255

    def change(self, measure: str) -> Measure | None:
        """The paired difference of a measure from the first to the last evaluation; None where one lacks it."""
        first, last = (self.values[epoch] for epoch in (min(self.values), max(self.values)))
        if self.captions is None or measure not in first or measure not in last:
            return None
        return Measure.of(last[measure] - first[measure], self.captions)

    def mean(self, measure: str, epoch: int) -> Measure | None:
        """A measure of an evaluation; None where it is not there."""
        values = self.values[epoch].get(measure)
        return None if values is None or self.captions is None else Measure.of(values, self.captions)


def read_subject(run: Path, config: Config | None = None) -> Subject:
    """Reads a run folder; damaged evaluations are left out.

    Args:
        run: The folder.
        config: Of the run; None reads it from the folder.

    Raises:
        RunError: It is none, or its metrics are damaged.
        ConfigError: Its configuration is not of this version.
    """
    folder = RunFolder.open(run)
    values: dict[int, Mapping[str, Tensor]] = {}
    for epoch in folder.evaluated_epochs():
        with suppress(RunError):
            values[epoch] = read_values(folder.evaluated(epoch))
    captions = read_captions(folder.evaluation(min(values))) if values else None
    course = read_course(folder, config)
    return Subject(
        folder=folder,
        summary=list_runs(run)[0],
        course=course,
        findings=tuple(verdicts(course)),
        values=values,
        captions=captions,
        texts=() if captions is None else _texts(folder, course.config, captions),
    )


def _texts(folder: RunFolder, config: Config, captions: Tensor) -> tuple[str, ...]:
    """The prompt of each of the E images, as the run's source gives it where that is what the run was evaluated on."""
    with suppress(OSError, UserError):
        prompts = chosen_prompts(config.evaluation, evaluation_source(folder.path, config))
        check_evaluated(folder.path, prompts)
        texts = tuple(prompt.text for prompt in prompts for _ in range(config.evaluation.images_per_prompt))
        if len(texts) == len(captions):
            return texts
    return tuple(f"prompt {number + 1}" for number in captions.tolist())


def keys_of(config: Config, *, full: bool) -> dict[str, object]:
    """A configuration's keys with dots, those of lists numbered: all, or those that differ from the defaults."""
    return dict(_flat(to_plain(config, full=full), ""))


def _flat(value: object, name: str) -> list[tuple[str, object]]:
    if isinstance(value, Mapping):
        return [pair for key, part in value.items() for pair in _flat(part, f"{name}.{key}".removeprefix("."))]
    if isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
        return [pair for number, part in enumerate(value) for pair in _flat(part, f"{name}.{number}")]
    return [(name, value)]
