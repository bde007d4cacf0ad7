"""Progress bars on the main process: one over epochs that stays, short-lived ones over an epoch's batches."""

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")


class Progress:
    """Bars and lines on stderr; silent where not enabled, without short-lived bars where stderr is no terminal."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._inner = enabled and sys.stderr.isatty()

    def track(self, items: Sequence[Item], label: str) -> Iterator[Item]:
        """Iterates with a bar that disappears when it is done."""
        yield from tqdm(items, desc=label, leave=False, disable=not self._inner, dynamic_ncols=True)

    def epochs(self, start: int, stop: int, *, timed: bool = False) -> "tqdm[int]":
        """The bar over a run's epochs; of a run that is timed without a guess at when the last one would end."""
        return tqdm(
            range(start, stop), initial=start, total=stop, desc="epochs", unit="epoch", disable=not self._enabled,
            dynamic_ncols=True, mininterval=0.5 if self._inner else 30.0,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]" if timed else None,
        )  # fmt: skip

    def line(self, text: str) -> None:
        """Prints a line without breaking a bar."""
        if self._enabled:
            tqdm.write(text, file=sys.stderr)
