"""A bar over long work, where tqdm is installed and a terminal is there."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rewards.optional import installed, require

Item = TypeVar("Item")


def track(items: Sequence[Item], label: str, *, show: bool) -> Iterator[Item]:
    """Iterates, with a bar on stderr that disappears when it is done."""
    if not show or not sys.stderr.isatty() or not installed("tqdm"):
        yield from items
        return
    yield from require("tqdm.auto", extra="", reward="learned").tqdm(items, desc=label, leave=False, dynamic_ncols=True)
