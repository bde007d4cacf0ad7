"""Runs configurations at two commits and compares what they leave behind."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from .plan import Planned, write_shared
from .processes import build_pipelines, divide, run
from .report import Report, report
from .sides import checked_out


def compare(
    plan: Sequence[Planned], commits: tuple[str, str], folder: Path, *, jobs: int, expect: Sequence[str]
) -> list[Report]:
    """Runs all configurations at both commits.

    Args:
        plan: The configurations.
        commits: The older and the newer one.
        folder: For all files.
        jobs: Processes at a time.
        expect: Patterns of entries that may differ.

    Raises:
        ValueError: git knows no such commit.
    """
    shared = folder / "shared"
    with ExitStack() as stack:
        sides = [stack.enter_context(checked_out(c, folder / side)) for c, side in zip(commits, "ab", strict=True)]
        write_shared(shared)
        if any(planned.loads(shared) for planned in plan):
            build_pipelines(shared)
        print(f"{sides[0].title} against {sides[1].title}: {len(plan)} configurations", file=sys.stderr)
        outcomes = run(divide(plan, sides, jobs=jobs), jobs=jobs)
        return [report(p.name, sides, [outcomes[side][p.name] for side in sides], expect) for p in plan]
