"""`ddpo doctor RUN`: reads a run and says what happened, in lines."""

from pathlib import Path

from trainers.diagnosis.course import Course, read_course, rise
from trainers.diagnosis.finding import Finding, rounded
from trainers.diagnosis.rules import findings
from trainers.run_folder.folder import RunFolder


def examine(run: Path) -> list[Finding]:
    """What there is to say of a run folder, as `verdicts`."""
    return verdicts(read_course(RunFolder.open(run)))


def verdicts(course: Course) -> list[Finding]:
    """What there is to say of a course, the worst first; a single `fine` where no rule finds anything."""
    found = findings(course)
    if found:
        return found
    change, errors = rise(course.reward)
    evidence = f"no rule finds anything in {len(course.rows)} epochs"
    if len(course.reward) >= 6:
        evidence += f"; the reward changed by {change:+.3g} ({errors:+.1f} standard errors)"
    if course.kl:
        evidence += f" at {rounded(course.kl[-1])} nats"
    return [Finding(name="run", verdict="fine", evidence=evidence, series=course.reward)]


def describe(found: list[Finding]) -> str:
    """Findings as text."""
    return "\n".join(line for finding in found for line in finding.lines())
