"""A bar over long work, where a terminal is there to show it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Sequence[Item], label: str, *, show: bool) -> Iterator[Item]:
    """Iterates, with a bar on stderr that disappears when it is done."""
    if not (show and sys.stderr.isatty()):
        yield from items
        return
    from tqdm.auto import tqdm

    yield from tqdm(items, desc=label, leave=False, dynamic_ncols=True)
