"""What `ddpo verify` does: choose the checks, run them with progress, print the table, write JSON and the report."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ddpo.denoiser import Precision
from ddpo.samplers import SamplerKind
from trainers.outputs import check_file, check_folder
from trainers.verification.conformance import likelihood_checks, load_subject
from trainers.verification.suite import all_checks, as_json, run_with_bar, select, table


def verify(
    *,
    full: bool,
    only: Sequence[str] | None,
    json_file: str | None,
    report: Path | None,
    model: str | None,
    sampler_kind: SamplerKind | None,
    num_steps: int,
    guidance_scale: float,
    precision: Precision,
) -> int:
    """Runs the checks and prints what they found.

    Args:
        full: Whether slow checks run too.
        only: Groups of checks; None for all.
        json_file: Where the measurements go as JSON: a file, `-` for stdout in place of the table, None for nowhere.
        report: Folder for figures and an HTML page, made if missing.
        model: Check the likelihood of this pipeline instead.
        sampler_kind: With `model`: the sampler; None takes the one that fits the model.
        num_steps: With `model`: denoising steps.
        guidance_scale: With `model`: classifier-free guidance.
        precision: With `model`: of the network.

    Returns:
        0 if all passed, else 1.

    Raises:
        ValueError: There is no such group, or the report or the JSON cannot be written; found before anything runs.
    """
    if report is not None:
        check_folder("--report", report)
        report.mkdir(parents=True, exist_ok=True)
    if json_file is not None and json_file != "-":
        check_file("--json", Path(json_file))
    if model is None:
        checks = select(all_checks(), full=full, only=only)
    else:
        subject = load_subject(
            model, sampler_kind=sampler_kind, num_steps=num_steps, guidance_scale=guidance_scale, precision=precision
        )
        checks = likelihood_checks(subject)
    rows = run_with_bar(checks)
    print(as_json(rows) if json_file == "-" else table(rows))  # noqa: T201
    if json_file is not None and json_file != "-":
        Path(json_file).write_text(as_json(rows) + "\n")
    if report is not None:
        from trainers.verification.report import write_report

        print(f"report: {write_report(report, rows)}", file=sys.stderr)  # noqa: T201
    return 0 if all(row.measurement.passed for row in rows) else 1
