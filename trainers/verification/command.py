"""What `ddpo verify` does: choose the checks, run them with progress, print the table, write JSON and the report."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpo.control.checks.base import Level
from trainers.run_folder.writable import check_file, check_folder
from trainers.verification.conformance import SubjectRequest, likelihood_checks, load_subject
from trainers.verification.suite import all_checks, as_json, run_with_bar, select, table


@dataclass(frozen=True, kw_only=True)
class VerifyRequest:
    """What is to be verified, and where the result goes.

    Attributes:
        level: The slowest checks that run.
        only: Groups of checks; None for all.
        json_file: Where the measurements go as JSON: a file, `-` for stdout in place of the table, None for nowhere.
        report: Folder for figures and an HTML page, made if missing; None for none.
        subject: The likelihood of this pipeline is checked instead; None for the mathematics.
    """

    level: Level
    only: Sequence[str] | None
    json_file: str | None
    report: Path | None
    subject: SubjectRequest | None


def verify(request: VerifyRequest) -> int:
    """Runs the checks and prints what they found.

    Returns:
        0 if all passed, else 1.

    Raises:
        UserError: There is no such group, or the report or the JSON cannot be written; found before anything runs.
    """
    if request.report is not None:
        check_folder("--report", request.report)
        request.report.mkdir(parents=True, exist_ok=True)
    if request.json_file is not None and request.json_file != "-":
        check_file("--json", Path(request.json_file))
    if request.subject is None:
        checks = select(all_checks(), level=request.level, only=request.only)
    else:
        checks = likelihood_checks(load_subject(request.subject))
    rows = run_with_bar(checks)
    print(as_json(rows) if request.json_file == "-" else table(rows))  # noqa: T201
    if request.json_file is not None and request.json_file != "-":
        Path(request.json_file).write_text(as_json(rows) + "\n", encoding="utf-8")
    if request.report is not None:
        from trainers.verification.report import write_report

        print(f"report: {write_report(request.report, rows)}", file=sys.stderr)  # noqa: T201
    return 0 if all(row.measurement.passed for row in rows) else 1
