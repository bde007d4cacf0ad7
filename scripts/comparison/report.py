"""What came of each configuration, and the table that says so."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .differences import Difference, differences
from .entries import Entries, read_run
from .processes import Outcome
from .sides import Side

SHOWN = 5
HEADER = ("configuration", "rows", "tensors", "values", "differing", "largest difference")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came of one configuration.

    Attributes:
        name: Of the configuration.
        entries: Of the newer side; None where nothing was compared.
        unexpected: Entries that differ.
        expected: Entries that differ and may.
        note: Why nothing was compared.
        passed: Whether nothing is wrong.
    """

    name: str
    entries: Entries | None = None
    unexpected: tuple[Difference, ...] = ()
    expected: tuple[Difference, ...] = ()
    note: str = ""
    passed: bool


def report(name: str, sides: Sequence[Side], outcomes: Sequence[Outcome], expect: Sequence[str]) -> Report:
    """Compares what both sides left of a configuration.

    Args:
        name: Of the configuration.
        sides: The older and the newer one.
        outcomes: How the run ended on each.
        expect: Patterns of entries that may differ.
    """
    older, newer = outcomes
    if older.kind == "refused" and newer.kind == "done":
        return Report(name=name, note=f"only at {sides[1].title}; the other says: {older.message}", passed=True)
    if older == newer and older.kind != "done":
        return Report(name=name, note=f"{older.kind} at both: {older.message}", passed=False)
    bad = [
        f"{o.kind} at {side.title}: {o.message}" for side, o in zip(sides, outcomes, strict=True) if o.kind != "done"
    ]
    if bad:
        return Report(name=name, note="; ".join(bad), passed=False)
    old, new = (read_run(side.run_folder(name)) for side in sides)
    found = tuple(differences(old.by_name, new.by_name))
    expected = tuple(d for d in found if any(fnmatchcase(d.name, pattern) for pattern in expect))
    unexpected = tuple(d for d in found if d not in expected)
    return Report(name=name, entries=new, unexpected=unexpected, expected=expected, passed=not unexpected)


def passed(reports: Sequence[Report]) -> bool:
    """Whether no configuration failed, and one at least was compared."""
    return all(r.passed for r in reports) and any(r.entries is not None for r in reports)


def describe(reports: Sequence[Report], expect: Sequence[str]) -> str:
    """The table, under it what differs, and the verdict as the last line."""
    rows = [HEADER, *(_row(r) for r in reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, "", *_details(reports), *_unmatched(reports, expect), _verdict(reports)])


def _row(report: Report) -> tuple[str, ...]:
    if report.entries is None:
        return (report.name, "-", "-", "-", "-", "not compared")
    entries, differing = report.entries, (*report.unexpected, *report.expected)
    num_values = len(entries.by_name) - entries.num_tensors
    counts = (entries.num_rows, entries.num_tensors, num_values, len(differing))
    return (report.name, *map(str, counts), _largest(differing))


def _largest(found: Sequence[Difference]) -> str:
    """The largest numerical difference."""
    sizes = [d.size for d in found if d.size is not None]
    if not sizes:
        return "not numerical" if found else "0"
    return "nan" if any(map(math.isnan, sizes)) else f"{max(sizes):.3g}"


def _details(reports: Sequence[Report]) -> Iterator[str]:
    for r in reports:
        if r.note:
            yield f"{r.name}: {r.note}"
        for title, found in (("", r.unexpected), (" as expected", r.expected)):
            if found:
                yield f"{r.name}: {_differ(len(found))}{title}"
            yield from (f"  {d.name}: {d.old} -> {d.new}" for d in found[:SHOWN])
            if len(found) > SHOWN:
                yield f"  and {len(found) - SHOWN} more"


def _unmatched(reports: Sequence[Report], expect: Sequence[str]) -> Iterator[str]:
    names = [d.name for r in reports for d in r.expected]
    for pattern in expect:
        if not any(fnmatchcase(name, pattern) for name in names):
            yield f"--expect {pattern}: no entry of that name differs"


def _verdict(reports: Sequence[Report]) -> str:
    differing = sum(len(r.unexpected) for r in reports)
    failed = [r.name for r in reports if r.entries is None and not r.passed]
    if failed:
        return f"{_differ(differing)}, and these configurations failed: {', '.join(failed)}"
    if differing:
        return _differ(differing)
    if not any(r.entries is not None for r in reports):
        return "nothing was compared"
    as_expected = sum(len(r.expected) for r in reports)
    return f"identical otherwise: {_differ(as_expected)} as expected" if as_expected else "identical"


def _differ(count: int) -> str:
    return "1 entry differs" if count == 1 else f"{count} entries differ"
