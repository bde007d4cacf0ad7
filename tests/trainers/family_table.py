"""Prints what `ddpo check` measures of every model family that is tested, as the table of docs/models.md.

python -m tests.trainers.family_table
"""

import sys

from ddpo import SamplerConfig
from tests.ddpo.test_families import FAMILIES
from tests.trainers.test_rare_families import RARE
from trainers.verification.conformance import likelihood_checks, make_subject, pipeline_checks
from trainers.verification.suite import run_checks


def main() -> None:
    """One row a family: the largest error of each check, in bold where one is above its tolerance."""
    table: dict[str, dict[str, float]] = {}
    failed: set[tuple[str, str]] = set()
    for family, spec in {**FAMILIES, **RARE}.items():
        sampler = SamplerConfig(kind=spec.sampler, num_steps=4, guidance_scale=spec.guidance, **spec.options)
        subject = make_subject(spec.build(), sampler=sampler, precision="fp32", device="cpu", fresh=spec.build)
        print(f"{family} ...", file=sys.stderr)
        checks = [*pipeline_checks(subject), *likelihood_checks(subject)]
        for row in run_checks(checks, announce=lambda index, check: None):
            errors = table.setdefault(family, {})
            errors[row.check] = max(errors.get(row.check, 0.0), row.measurement.error)
            if not row.measurement.passed:
                failed.add((family, row.check))
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    print("| family | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for family, row in table.items():
        errors = ["" if name not in row else f"{row[name]:.0e}" if row[name] else "0" for name in names]
        cells = [f"**{e}**" if (family, name) in failed else e for e, name in zip(errors, names, strict=True)]
        print(f"| {family} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
