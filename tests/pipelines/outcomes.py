"""What becomes of a tiny pipeline: works, refused (what a user is told), not built, or a bug, wrong or raw.

Kinds stand before a colon, the text behind it.

`works` is that every check of `ddpo check` passes: what the policy does is what the stock pipeline does.
"""

import time
from dataclasses import dataclass

from ddpo.pipeline.scheduler import default_sampler
from ddpo.sampling.samplers import SamplerConfig
from ddpo.validation import UserError
from tests.pipelines.build import Row, build_pipeline
from trainers.verification.conformance import likelihood_checks, make_subject, pipeline_checks
from trainers.verification.suite import run_checks

KINDS = ("works", "refused", "wrong", "raw", "not built")
BUGS = ("wrong", "raw")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one row.

    Attributes:
        title: The row's.
        guided: What becomes of it with guidance; empty where it has no such run.
        unguided: Without.
        load_seconds: How long a policy of it took to be made, or to be refused.
    """

    title: str
    guided: str
    unguided: str
    load_seconds: float

    @property
    def kinds(self) -> set[str]:
        """The kinds of both runs."""
        return {kind_of(text) for text in (self.guided, self.unguided) if text}


def kind_of(text: str) -> str:
    """The kind that a text of a run begins with."""
    return text.partition(":")[0]


def sampler(row: Row, guidance: float) -> SamplerConfig:
    """Three noisy steps of the sampler that fits."""
    fitting = default_sampler(build_pipeline(row).scheduler)
    return SamplerConfig(kind=fitting.kind, eta=fitting.eta, num_steps=3, guidance_scale=guidance,
                         height=row.size, width=row.size, num_frames=row.frames)  # fmt: skip


def outcome(row: Row) -> Outcome:
    """Tries a row with guidance and without."""
    runs = [(_tried(row, scale) if scale is not None else ("", 0.0)) for scale in (row.guided, row.unguided)]
    (guided, _), (unguided, _) = runs
    seconds = max(seconds for _, seconds in runs)
    return Outcome(title=row.title, guided=guided, unguided=unguided, load_seconds=round(seconds, 2))


def _tried(row: Row, guidance: float) -> tuple[str, float]:
    """What becomes of a pipeline under a guidance scale, and the seconds that a policy of it took."""
    try:
        config, pipeline = sampler(row, guidance), build_pipeline(row)
    except Exception as error:  # whatever its classes raise
        return _line("not built", f"{type(error).__name__}: {error}"), 0.0
    begun = time.perf_counter()
    try:
        subject = make_subject(pipeline, sampler=config, precision="fp32", device="cpu",
                               fresh=lambda: build_pipeline(row))  # fmt: skip
    except UserError as error:
        return _line("refused", str(error)), time.perf_counter() - begun
    except Exception as error:
        return _line("raw", f"{type(error).__name__}: {error}"), time.perf_counter() - begun
    seconds = time.perf_counter() - begun
    checks = [*pipeline_checks(subject), *likelihood_checks(subject)]
    rows = [made for made in run_checks(checks, announce=lambda index, check: None) if not made.measurement.passed]
    failed = [f"{made.check}, {made.measurement.obtained} {made.measurement.error:.2g}" for made in rows]
    return (_line("wrong", "; ".join(failed)) if failed else "works"), seconds


def _line(kind: str, text: str) -> str:
    """One line that fits into a table."""
    return f"{kind}: {' '.join(text.split()).replace('|', '/')}"
