"""All checks, how they are chosen and run, and the table that they end in."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import get_args

from tqdm.auto import tqdm

from ddpo.control.checks.base import Check, Level, Measurement
from ddpo.validation import UserError
from rewards.tools.table import aligned

MODULES = (
    "ddpo.control.checks.tabular",
    "ddpo.control.checks.lqr",
    "ddpo.control.checks.periodic_lqr",
    "ddpo.control.checks.merton",
    "ddpo.control.checks.double_well",
    "ddpo.control.checks.generator",
    "ddpo.control.checks.policy_iteration",
    "ddpo.control.checks.model_free",
    "ddpo.control.checks.time_reversal",
    "ddpo.control.checks.elbo",
    "ddpo.control.checks.soft_value",
    "ddpo.control.checks.score_matching",
    "ddpo.control.checks.energy_model",
    "ddpo.control.checks.soc",
    "ddpo.control.checks.samplers",
    "ddpo.control.checks.chain",
    "ddpo.control.checks.advantages",
    "ddpo.control.checks.kl_response",
    "ddpo.control.checks.gradient",
    "ddpo.control.checks.critic",
    "ddpo.control.checks.switches",
    "ddpo.control.checks.train_guidance",
    "ddpo.control.checks.shared_head",
    "ddpo.control.checks.clean_sample",
    "ddpo.control.checks.preference",
    "ddpo.control.checks.steering",
    "ddpo.control.checks.guidance",
    "trainers.verification.optimum",
    "trainers.verification.critic",
    "trainers.verification.natural_gradient",
    "trainers.verification.clean_sample",
    "trainers.verification.preference",
    "trainers.verification.reward_gradient",
    "trainers.verification.adjoint",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measurement, where it came from and how long it took."""

    group: str
    check: str
    claim: str
    measurement: Measurement
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """The row as plain values; numbers that JSON lacks become text."""
        found = self.measurement
        values = {
            "group": self.group, "check": self.check, "claim": self.claim, "measured": found.name,
            "exact": found.exact, "obtained": found.obtained, "error": found.error, "tolerance": found.tolerance,
            "seconds": round(self.seconds, 3), "passed": found.passed,
        }  # fmt: skip
        return {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }


def all_checks() -> tuple[Check, ...]:
    """Every check that needs no model, in the order in which they build on each other."""
    return tuple(check for module in MODULES for check in import_module(module).CHECKS)


def select(checks: Sequence[Check], *, level: Level, only: Sequence[str] | None) -> list[Check]:
    """The checks of a level and of some groups.

    Args:
        checks: All.
        level: The slowest that are wanted.
        only: Names of groups; None for all.

    Raises:
        UserError: There is no such group, or nothing is left.
    """
    groups = list(dict.fromkeys(check.group for check in checks))
    unknown = [name for name in only or () if name not in groups]
    if unknown:
        raise UserError(f"--only {','.join(unknown)}: no such group of checks; choose from {', '.join(groups)}")
    chosen = [check for check in checks if only is None or check.group in only]
    levels = get_args(Level)
    wanted = [check for check in chosen if levels.index(check.level) <= levels.index(level)]
    if not wanted:
        least = min((check.level for check in chosen), key=levels.index)
        raise UserError(f"all checks of {','.join(only or groups)} are slow ones; add --{least}")
    return wanted


def run_checks(checks: Sequence[Check], *, announce: Callable[[int, Check], None]) -> Iterator[Row]:
    """Runs checks one by one; one that raises is a row that fails.

    Args:
        checks: What to run.
        announce: Told the index and the check before each starts.
    """
    for index, check in enumerate(checks):
        announce(index, check)
        started = time.perf_counter()
        try:
            for found in check.run():
                yield _row(check, found, time.perf_counter() - started)
                started = time.perf_counter()
        except Exception as error:
            raised = Measurement(name="raised", exact="", obtained=f"{type(error).__name__}: {error}",
                                 error=math.nan, tolerance=0.0)  # fmt: skip
            yield _row(check, raised, time.perf_counter() - started)


def run_with_bar(checks: Sequence[Check]) -> list[Row]:
    """Runs checks under a bar on stderr that names the one at work."""
    with tqdm(total=len(checks), unit="check", dynamic_ncols=True) as bar:

        def announce(index: int, check: Check) -> None:
            bar.n = index
            bar.set_description(f"{check.group}: {check.name}")

        rows = list(run_checks(checks, announce=announce))
        bar.n = len(checks)
        bar.set_description("verified")
    return rows


def _row(check: Check, found: Measurement, seconds: float) -> Row:
    return Row(group=check.group, check=check.name, claim=check.claim, measurement=found, seconds=seconds)


HEADER = ("check", "measured", "exact", "obtained", "error", "tolerance", "seconds", "")


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table."""
    found = row.measurement
    return (
        f"{row.group}: {row.check}", found.name, _number(found.exact), _number(found.obtained), f"{found.error:.1e}",
        f"{found.tolerance:.1e}", f"{row.seconds:.1f}", "pass" if found.passed else "FAIL",
    )  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """The rows for people, with a line that sums them up."""
    lines = aligned([HEADER, *map(cells, rows)])
    return "\n".join([*lines, "", summary(rows)])


def summary(rows: Sequence[Row]) -> str:
    """How many passed, in how long."""
    failed = sum(not row.measurement.passed for row in rows)
    verdict = "all passed" if failed == 0 else f"{failed} FAILED"
    return f"{len(rows)} measurements, {verdict}, {sum(row.seconds for row in rows):.0f} s"


def as_json(rows: Sequence[Row]) -> str:
    """The rows as one JSON document."""
    passed = all(row.measurement.passed for row in rows)
    return json.dumps({"passed": passed, "measurements": [row.as_dict() for row in rows]}, indent=2)


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.10g}"
