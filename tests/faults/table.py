"""Faults tried, and how many were borne well."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Case:
    """One fault that was tried.

    Attributes:
        fault: Its kind, a row of the table.
        what: The file, moment or peer.
        problem: What was wrong; empty for nothing.
    """

    fault: str
    what: str
    problem: str = ""


def table(cases: list[Case]) -> str:
    """A row for each kind of fault, and a line for each that was not borne well."""
    kinds = dict.fromkeys(case.fault for case in cases)
    rows = [("fault", "tried", "good")]
    for kind in kinds:
        own = [case for case in cases if case.fault == kind]
        rows.append((kind, str(len(own)), str(sum(not case.problem for case in own))))
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{name:<{width}}  {tried:>5}  {good:>4}" for name, tried, good in rows]
    return "\n".join([*lines, *(f"BAD {case.fault}: {case.what}: {case.problem}" for case in cases if case.problem)])
