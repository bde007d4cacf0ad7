"""A session of labelling: which pair is next, and a file that grows by one line a choice.

Each line is a labelled pair that `ddpo rewards fit` reads, with the side on which `a` was shown and the time:

    {"prompt": "a red circle", "a": "003.png", "b": "017.png", "label": 1, "left": "b", "time": "2026-01-02T03:04:05Z"}

A skipped pair has `"skipped": true` instead of a label. A choice is on the disk before the next pair is shown; a line
that a crash cut short is removed when the file is opened again; a pair that has a line is not shown again. Undo cuts
the last line off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Literal, Self, final, get_args
from zlib import crc32

from filelock import lock_descriptor

from rewards.base import UserError
from rewards.preferences.pairs import Pair, as_entry, parse_pair

Choice = Literal["left", "right", "tie", "skip"]
CHOICES = get_args(Choice)
_LINE_START = b'{"prompt": "'


class StaleChoice(ValueError):
    """A choice for a pair that is not the one to be decided now."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a session stands.

    Attributes:
        current: Number of the pair to decide, None when all are.
        following: Number of the one after it, None when there is none.
        labelled: Pairs with a label, ties included.
        skipped: Pairs passed over.
        total: Pairs of the session.
    """

    current: int | None
    following: int | None
    labelled: int
    skipped: int
    total: int


@final
class LabelSession:
    """Pairs to decide and the file of what was decided; safe to use from several threads, refuses a second process.

    Args:
        pairs: In the order to be shown; a pair that stands there twice is shown once.
        output: File of labels, made or continued.

    Raises:
        UserError: The file holds a malformed line, or another process has it open for labelling.
    """

    def __init__(self, pairs: Sequence[Pair], output: Path) -> None:
        self.pairs = tuple({pair.key: pair for pair in reversed(pairs)}.values())[::-1]
        self._folder = output.parent
        self._lock = Lock()
        output.parent.mkdir(parents=True, exist_ok=True)
        self._file = output.open("a+b")
        try:
            _lock_file(self._file.fileno(), output)
            self._history = self._read(output)
        except ValueError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def a_is_left(self, number: int) -> bool:
        """Whether picture a of a pair is shown on the left: a fair coin, the same each time the pair is shown."""
        pair = self.pairs[number]
        return crc32(f"{pair.prompt}\n{pair.a.name}\n{pair.b.name}\nside".encode()) % 2 == 0

    def progress(self) -> Progress:
        """Where the session stands."""
        with self._lock:
            return self._progress()

    def choose(self, number: int, choice: Choice) -> Progress:
        """Records the decision on a pair.

        Raises:
            StaleChoice: The pair is not the current one: it was decided already, perhaps in another window.
        """
        with self._lock:
            if number != self._progress().current:
                raise StaleChoice(f"pair {number} is not the one to decide now")
            self._append(number, choice)
            return self._progress()

    def undo(self) -> Progress:
        """Takes the last decision on a pair of this session back; nothing when there is none."""
        with self._lock:
            if self._history and self._history[-1][0] is not None:
                _, start, _ = self._history.pop()
                self._file.truncate(start)
                os.fsync(self._file.fileno())
            return self._progress()

    def _progress(self) -> Progress:
        decided = {number: skipped for number, _, skipped in self._history if number is not None}
        waiting = [number for number in range(len(self.pairs)) if number not in decided][:2]
        return Progress(
            current=waiting[0] if waiting else None,
            following=waiting[1] if len(waiting) > 1 else None,
            labelled=sum(not skipped for skipped in decided.values()),
            skipped=sum(decided.values()),
            total=len(self.pairs),
        )

    def _append(self, number: int, choice: Choice) -> None:
        entry: dict[str, str | float | bool] = {**as_entry(self.pairs[number], self._folder)}
        entry.pop("label", None)
        a_is_left = self.a_is_left(number)
        if choice == "skip":
            entry["skipped"] = True
        else:
            entry["label"] = 0.5 if choice == "tie" else float((choice == "left") == a_is_left)
        entry["left"] = "a" if a_is_left else "b"
        entry["time"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        start = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._history.append((number, start, choice == "skip"))

    def _read(self, output: Path) -> list[tuple[int | None, int, bool]]:
        """For each line of the file: the pair's number (None for a pair of another session), its place, if skipped.

        All lines are read before the file is touched: one that is none of labels stays as it is.
        """
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        rest = content[whole:]
        lines = content[:whole].splitlines(keepends=True)
        is_cut_short = bool(rest) and _is_beginning(rest)
        if rest and not is_cut_short:
            lines.append(rest)
        number_of = {pair.key: number for number, pair in enumerate(self.pairs)}
        history: list[tuple[int | None, int, bool]] = []
        start = 0
        for line_number, line in enumerate(lines, 1):
            text = line.decode(errors="replace")
            if text.strip():
                try:
                    labelled = parse_pair(text, folder=self._folder, labelled=True)
                    pair = labelled or parse_pair(text, folder=self._folder, labelled=False)
                except ValueError as error:
                    raise UserError(f"{output}: line {line_number}: {error}") from error
                assert pair is not None, "only a skipped pair is passed over, and only where labels are asked for"
                history.append((number_of.get(pair.key), start, labelled is None))
            start += len(line)
        if is_cut_short:
            self._file.truncate(whole)
        elif rest:  # whole, but for the end of its line
            self._file.write(b"\n")
            self._file.flush()
        return history


def _is_beginning(rest: bytes) -> bool:
    """Whether this is a line of labels that a crash cut short: it begins like one, and is not whole."""
    try:
        json.loads(rest)
    except (ValueError, RecursionError):
        return rest.startswith(_LINE_START[: len(rest)])
    return False


def _lock_file(descriptor: int, path: Path) -> None:
    """Holds the file for this process until it ends, also by force; not where the file system has no locks."""
    try:
        if lock_descriptor(descriptor, blocking=False):
            return
    except OSError:
        return
    raise UserError(f"{path} is open for labelling in another process; use that page, or another --out")
