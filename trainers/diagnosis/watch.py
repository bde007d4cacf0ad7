"""What the doctor says while a run goes on: each finding once, when its rule first finds it.

Only what is wrong is said, and only by rules that read what has happened. That nothing has happened yet (a flat reward)
is said at the end, and over-optimisation by the evaluation that sees it.
"""

from collections.abc import Mapping

from trainers.config import Config
from trainers.diagnosis.course import Course
from trainers.diagnosis.finding import Finding
from trainers.diagnosis.rules import MIN_EPOCHS, RULES, flat, over_optimised
from trainers.run_folder.folder import RunFolder, read_metrics

WATCHED = tuple(rule for rule in RULES if rule not in (flat, over_optimised))


class Watch:
    """Looks at a run's metrics after each epoch, from the sixth one on.

    What it would have said of the epochs that a resumed run has finished already counts as said.
    """

    def __init__(self, folder: RunFolder, config: Config) -> None:
        self._folder, self._config = folder, config
        self._rows: list[Mapping[str, object]] | None = None
        self._said: set[str] = set()

    def look(self, row: Mapping[str, object]) -> list[Finding]:
        """What is new.

        Args:
            row: The epoch's metrics, which are in the run folder already.
        """
        if self._rows is None:
            self._rows = list(read_metrics(self._folder.path)[:-1])
            self._new()
        self._rows.append(row)
        return self._new()

    def _new(self) -> list[Finding]:
        if self._rows is None or len(self._rows) < MIN_EPOCHS:
            return []
        course = Course(config=self._config, rows=self._rows)
        found = [finding for rule in WATCHED if (finding := rule(course)) is not None]
        new = [finding for finding in found if finding.verdict == "wrong" and finding.name not in self._said]
        self._said |= {finding.name for finding in new}
        return new
