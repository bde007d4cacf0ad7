"""Which faults are tried: all, a few, or a part drawn by a seed; and which a run before this one has tried already."""

import json
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from tests.faults.table import Case

_WHOLE = 2**32


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is tried.

    Attributes:
        quick: Whether a group takes few of its faults.
        fraction: Part of the faults that is tried; which ones depends on their names and the seed alone.
        seed: Of that draw.
        done: Kind and name of the faults that were tried before.
    """

    quick: bool = False
    fraction: float = 1.0
    seed: int = 0
    done: frozenset[tuple[str, str]] = frozenset()

    def takes(self, fault: str, what: str) -> bool:
        """Whether a fault is to be tried now."""
        drawn = crc32(f"{self.seed}\n{fault}\n{what}".encode()) < self.fraction * _WHOLE
        return drawn and (fault, what) not in self.done


def read_done(file: Path) -> list[Case]:
    """What an earlier run has tried."""
    return [Case(**json.loads(line)) for line in file.read_text().splitlines()] if file.is_file() else []


def keep(cases: list[Case], file: Path) -> None:
    """Writes what was tried, whole at every moment."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text("".join(json.dumps(vars(case)) + "\n" for case in cases))
    partial.replace(file)
