"""What a sweep has found: of every combination the last evaluation's measures, mean and standard error over its seeds.

The evaluation's prompts and noise are the same in all runs, so the error says how much the seed of training matters on
them: s / sqrt(n) with s the standard deviation (n - 1) over the n runs of a combination.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rewards.tools.table import table
from trainers.evaluation.overoptimisation import read_values
from trainers.evaluation.statistics import Measure
from trainers.run_folder.folder import RunFolder
from trainers.run_folder.ledger import replace_text
from trainers.sweep.plan import Member, Sweep

TABLE = "sweep.json"
_ALIKE = 1e-5  # relative; first evaluations further apart are of another model, sampler, prompts or seed


@dataclass(frozen=True, kw_only=True)
class Row:
    """A combination of the grid.

    Attributes:
        values: By key.
        runs: Its runs that have ended.
        measures: Mean over these runs by measure; no error of a single run.
    """

    values: dict[str, str]
    runs: tuple[str, ...]
    measures: dict[str, Measure]


def rows_of(members: Sequence[Member]) -> list[Row]:
    """A row for each combination, in the order of the grid.

    Args:
        members: The runs that have ended.
    """
    together: dict[tuple[str, ...], list[Member]] = {}
    for member in members:
        together.setdefault(tuple(member.values.values()), []).append(member)
    return [
        Row(
            values=alike[0].values,
            runs=tuple(member.run.name for member in alike),
            measures=_over_runs([_means(member.run, -1) for member in alike]),
        )
        for alike in together.values()
    ]


def _means(run: Path, which: int) -> dict[str, float]:
    """Means of an evaluation of a run by measure: its first, 0, or its last, -1; empty where it has none."""
    folder = RunFolder(path=run)
    epochs = folder.evaluated_epochs()
    if not epochs:
        return {}
    return {name: float(value.double().mean()) for name, value in read_values(folder.evaluated(epochs[which])).items()}


def _over_runs(means: Sequence[dict[str, float]]) -> dict[str, Measure]:
    found = {}
    for name in dict.fromkeys(name for one in means for name in one):
        values = [one[name] for one in means if name in one]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        found[name] = Measure(mean=statistics.fmean(values), error=error)
    return found


def write_table(sweep: Sweep, ended: Sequence[Member]) -> str:
    """Writes the rows as JSON into the sweep's folder.

    Args:
        sweep: The sweep.
        ended: Its runs that have ended, at least one.

    Returns:
        The table for people.
    """
    rows = rows_of(ended)
    record = [
        {"values": row.values, "runs": row.runs, "measures": {name: vars(one) for name, one in row.measures.items()}}
        for row in rows
    ]
    replace_text(sweep.folder / TABLE, json.dumps(record, indent=1) + "\n")
    keys = list(ended[0].values)
    names = list(dict.fromkeys(name for row in rows for name in row.measures))
    starts = [_means(member.run, 0) for member in ended]
    alike = all(_is_alike(starts[0], start) for start in starts)
    lines = [
        [*row.values.values(), str(len(row.runs)), *(str(row.measures.get(name, "-")) for name in names)]
        for row in rows
    ]
    if alike and starts[0]:
        first = {name: f"{mean:.4g}" for name, mean in starts[0].items()}
        lines.insert(0, ["pretrained", *[""] * len(keys), *(first.get(name, "-") for name in names)])
    notes = ["last evaluations: mean ± standard error over the runs of each row, which differ in their seeds"]
    if not alike:
        notes.append("the runs' first evaluations differ (model, sampler, prompts or seed): rows are not comparable")
    heads = [*keys, "runs"]
    return "\n".join([table([*heads, *names], lines), *notes])


def _is_alike(one: dict[str, float], other: dict[str, float]) -> bool:
    shared = one.keys() & other.keys()
    return all(math.isclose(one[name], other[name], rel_tol=_ALIKE, abs_tol=_ALIKE) for name in shared)
