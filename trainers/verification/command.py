"""What `ddpo verify` does: choose the checks, run them with progress, print the table, write JSON and the report."""

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from ddpo import SamplerConfig
from ddpo.control.checks.base import Check
from ddpo.denoiser import Precision
from ddpo.samplers import SamplerKind
from trainers.verification.likelihood import likelihood_checks
from trainers.verification.suite import Row, all_checks, as_json, run_checks, select, table


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
        sampler_kind: With `model`: the sampler; None takes `ddim`.
        num_steps: With `model`: denoising steps.
        guidance_scale: With `model`: classifier-free guidance.
        precision: With `model`: of the network.

    Returns:
        0 if all passed, else 1.

    Raises:
        ValueError: There is no such group.
        OSError: The report's folder cannot be written; found before anything runs.
    """
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
    if model is None:
        checks = select(all_checks(), full=full, only=only)
    else:
        sampler = SamplerConfig(kind=sampler_kind or "ddim", num_steps=num_steps, guidance_scale=guidance_scale)
        checks = list(likelihood_checks(model, sampler=sampler, precision=precision, device=None))
    rows = run_with_bar(checks)
    print(as_json(rows) if json_file == "-" else table(rows))  # noqa: T201
    if json_file is not None and json_file != "-":
        Path(json_file).write_text(as_json(rows) + "\n")
    if report is not None:
        from trainers.verification.report import write_report

        print(f"report: {write_report(report, rows)}", file=sys.stderr)  # noqa: T201
    return 0 if all(row.measurement.passed for row in rows) else 1


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
