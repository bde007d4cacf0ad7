"""The course of a run: its metrics as series over epochs, read from a run folder as far as they go."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from trainers.config import Config
from trainers.config.io import load_config
from trainers.run_folder.folder import RunFolder, read_metrics
from trainers.tracking.first_look import metric_key


@dataclass(frozen=True, kw_only=True)
class Course:
    """What the rules read.

    Attributes:
        config: Of the run.
        rows: Its metrics, one an epoch, oldest first.
        evaluations: Their records, oldest first: `measures` by name, `heldout` findings.
    """

    config: Config
    rows: Sequence[Mapping[str, object]]
    evaluations: Sequence[Mapping[str, object]] = ()

    def series(self, *names: str) -> list[float]:
        """The finite values of the first of these metrics that the run has, by epoch."""
        for name in names:
            values = [row.get(name) for row in self.rows]
            found = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
            if found:
                return found
        return []

    @property
    def measures(self) -> list[str]:
        """Names of what the evaluations measured, in the order to read them."""
        records = [record.get("measures") for record in self.evaluations]
        return list(dict.fromkeys(name for found in records if isinstance(found, Mapping) for name in found))

    def measured(self, name: str) -> list[float]:
        """The means of a measure over the evaluations."""
        found = []
        for record in self.evaluations:
            with suppress(KeyError, TypeError, ValueError):
                found.append(float(record["measures"][name]["mean"]))  # type: ignore[index]
        return found

    @property
    def evaluation_rows(self) -> list[dict[str, object]]:
        """What the evaluations measured, a row an epoch, by the keys of trackers; `KEY_se` is an error of `KEY`."""
        rows: list[dict[str, object]] = []
        for record in self.evaluations:
            with suppress(KeyError, TypeError, AttributeError):
                measures = {f"eval/{metric_key(name)}": one for name, one in record["measures"].items()}  # type: ignore[attr-defined]
                means = {key: one["mean"] for key, one in measures.items()}
                errors = {f"{key}_se": one["error"] for key, one in measures.items()}
                rows.append({"epoch": record["epoch"], **means, **errors})
        return rows

    @property
    def reward(self) -> list[float]:
        """Mean total reward by epoch."""
        return self.series("reward/mean")

    @property
    def kl(self) -> list[float]:
        """Path KL by epoch, nats; of the samples, so that the first is that of the pretrained weights."""
        return self.series("kl/path_nats", "kl/conditional_path_nats")

    @property
    def can_weigh_kl(self) -> bool:
        """Whether the objective takes a weight of the KL; others refuse one."""
        demand = self.config.objective.build().demand
        return demand.likelihood or (demand.weighs_kl and not self.config.sampler.is_noise_free)

    @property
    def spread(self) -> float:
        """Standard deviation of the total reward over the images of the first epochs; NaN where it is not known."""
        early = self.series("reward/std")[:3]
        return sum(early) / len(early) if early else math.nan


def read_course(folder: RunFolder, config: Config | None = None) -> Course:
    """The course of a run; a row that is missing, or a damaged evaluation record, is left out.

    Args:
        folder: Of the run.
        config: Of the run; None reads it from the folder.

    Raises:
        RunError: It has no metrics, or they are damaged.
        ConfigError: Its configuration is not of this version.
    """
    records = []
    for epoch in folder.evaluated_epochs():
        with suppress(OSError, ValueError):
            record = json.loads(folder.evaluation(epoch).with_suffix(".json").read_text(encoding="utf-8"))
            if isinstance(record, dict):
                records.append(record)
    config = load_config(folder.config_file) if config is None else config
    return Course(config=config, rows=read_metrics(folder.path), evaluations=records)


def rise(values: Sequence[float]) -> tuple[float, float]:
    """How far a noisy series rose from its first to its last third, and that in standard errors.

    The noise is that of successive differences, Var(y_{i+1} - y_i) / 2, which a slow trend hardly enters (von Neumann).
    Needs 6 values; fewer give (0, 0).
    """
    if len(values) < 6:
        return 0.0, 0.0
    third = len(values) // 3
    change = sum(values[-third:]) / third - sum(values[:third]) / third
    noise = sum((b - a) ** 2 for a, b in zip(values, values[1:], strict=False)) / (2 * (len(values) - 1))
    error = math.sqrt(2 * noise / third)
    return change, change / error if error > 0 else math.copysign(math.inf, change) if change else 0.0
