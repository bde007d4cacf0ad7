"""Builds tiny pipelines of diffusers' classes, holds each to `ddpo check`, and prints a line for each.

    python -m tests.pipelines [--only NAME ...] [--seconds S]

works | refused: what a user is told | raw: another error, a bug | wrong: a check that fails | not built: why
"""

import argparse
import logging
import time
from collections import Counter

import diffusers

from ddpo.pipeline.scheduler import default_sampler
from ddpo.sampling.samplers import SamplerConfig
from ddpo.validation import UserError
from tests.pipelines.build import Row, build_pipeline
from tests.pipelines.rows import ROWS
from trainers.verification.conformance import likelihood_checks, make_subject, pipeline_checks
from trainers.verification.suite import run_checks


def sampler(row: Row, guidance: float) -> SamplerConfig:
    """Three noisy steps of the sampler that fits."""
    fitting = default_sampler(build_pipeline(row).scheduler)
    return SamplerConfig(kind=fitting.kind, eta=fitting.eta, num_steps=3, guidance_scale=guidance,
                         height=row.size, width=row.size, num_frames=row.frames)  # fmt: skip


def tried(row: Row, guidance: float) -> str:
    """What becomes of a pipeline under a guidance scale."""
    try:
        config = sampler(row, guidance)
    except Exception as error:  # whatever its classes raise
        return f"not built: {type(error).__name__}: {error}"
    try:
        subject = make_subject(build_pipeline(row), sampler=config, precision="fp32", device="cpu",
                               fresh=lambda: build_pipeline(row))  # fmt: skip
    except UserError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"raw: {type(error).__name__}: {error}"
    checks = [*pipeline_checks(subject), *likelihood_checks(subject)]
    rows = run_checks(checks, announce=lambda index, check: None)
    failed = [f"{made.check} {made.measurement.obtained}" for made in rows if not made.measurement.passed]
    return f"wrong: {'; '.join(failed)}" if failed else "works"


def main() -> None:
    """A line a class and guidance, then how many became what."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="titles of rows")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further row after so long")
    options = parser.parse_args()
    for name in ("diffusers", "transformers", "ddpo"):
        logging.getLogger(name).setLevel(logging.ERROR)
    diffusers.utils.logging.set_verbosity_error()
    counts: Counter[str] = Counter()
    started = time.monotonic()
    print("| pipeline | for | guided | not guided | seconds |\n|---|---|---|---|---|")
    for row in ROWS:
        if (options.only and row.title not in options.only) or time.monotonic() - started > options.seconds:
            continue
        begun = time.monotonic()
        cells = ["" if scale is None else tried(row, scale) for scale in (row.guided, row.unguided)]
        counts.update(cell.partition(":")[0] for cell in cells if cell)
        texts = [" ".join(cell.split())[:300].replace("|", "/") for cell in cells]
        print(f"| {row.title} | {row.group} | {' | '.join(texts)} | {time.monotonic() - begun:.0f} |", flush=True)
    print("\n" + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))


if __name__ == "__main__":
    main()
