"""Progress bars on the main process: one over epochs that stays, short-lived ones over an epoch's batches."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")
_LINE_SECONDS = 60.0  # between two lines about an epoch's batches in a log file


def say(text: str) -> None:
    """Prints on stdout; what its encoding lacks, such as a sign outside of ASCII, is replaced."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding), flush=True)  # noqa: T201


class Progress:
    """Bars and lines on stderr; silent where not enabled, with lines for short-lived bars where it is no terminal."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._inner = enabled and sys.stderr.isatty()

    def track(self, items: Sequence[Item], label: str) -> Iterator[Item]:
        """Iterates with a bar that disappears when it is done; in a log file, with a line now and then."""
        if self._inner or not self._enabled:
            yield from tqdm(items, desc=label, leave=False, disable=not self._inner, dynamic_ncols=True)
            return
        told = time.monotonic()
        for done, item in enumerate(items):
            if time.monotonic() - told > _LINE_SECONDS:
                told = time.monotonic()
                self.line(f"{label}: {done} of {len(items)} done")
            yield item

    @contextmanager
    def counting(self, total: int, label: str) -> Iterator[Callable[[int], None]]:
        """A bar that disappears when it is done; it moves by what is told, in a log file it is a line now and then."""
        bar = tqdm(total=total, desc=label, leave=False, disable=not self._inner, dynamic_ncols=True)
        done, told = 0, time.monotonic()

        def advance(count: int) -> None:
            nonlocal done, told
            done += count
            bar.update(count)
            if not self._inner and time.monotonic() - told > _LINE_SECONDS:
                told = time.monotonic()
                self.line(f"{label}: {done} of {total} done")

        with bar:
            yield advance

    def epochs(self, start: int, stop: int, *, timed: bool = False) -> "tqdm[int]":
        """The bar over a run's epochs; of a run that is timed without a guess at when the last one would end."""
        return tqdm(
            range(start, stop), initial=start, total=stop, desc="epochs", unit="epoch", disable=not self._enabled,
            dynamic_ncols=True, mininterval=0.5 if self._inner else 30.0,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]" if timed else None,
        )  # fmt: skip

    def note_time(self, bar: "tqdm[int]", minutes: float, limit: float | None, *, epochs: int) -> None:
        """Says at the end of the bar over epochs how much of a time limit is used up, and when the run would end.

        Args:
            bar: Over all epochs of the run.
            minutes: Used by the epochs that are done.
            limit: Of minutes; None says nothing.
            epochs: That are done.
        """
        if limit is not None:
            left = min(max(0.0, limit - minutes), minutes / epochs * (bar.total - epochs))
            bar.set_postfix_str(f"{minutes:.3g} of {limit:g} min, {left:.2g} left", refresh=False)

    def line(self, text: str) -> None:
        """Prints a line without breaking a bar."""
        if self._enabled:
            tqdm.write(text, file=sys.stderr)
