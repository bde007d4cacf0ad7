"""Compares the entries of two runs bit for bit.

Two tensors are the same when type, shape and every bit are; NaN is the same as NaN, +0 is not -0. Numbers read from
JSON are the same when they are written alike, since a float is written as its shortest text.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .entries import Entry

MISSING = "missing"
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One entry that two runs have not alike.

    Attributes:
        name: Of the entry.
        old: What the first run has, as text; `missing` where it has none.
        new: What the second run has.
        size: Largest absolute difference of two numbers or elements, NaN where only one of them is NaN; None where
            there is no such number.
    """

    name: str
    old: str
    new: str
    size: float | None


def differences(old: Mapping[str, Entry], new: Mapping[str, Entry]) -> Iterator[Difference]:
    """Yields the entries that differ, or that one of the two lacks, in the order of `old`."""
    for name in {**old, **new}:
        if name not in old:
            yield Difference(name=name, old=MISSING, new=_short(new[name]), size=None)
        elif name not in new:
            yield Difference(name=name, old=_short(old[name]), new=MISSING, size=None)
        elif isinstance(old[name], Tensor) and isinstance(new[name], Tensor):
            yield from _tensors(name, old[name], new[name])
        elif repr(old[name]) != repr(new[name]):
            yield Difference(
                name=name, old=_short(old[name]), new=_short(new[name]), size=_distance(old[name], new[name])
            )


def _tensors(name: str, old: Tensor, new: Tensor) -> Iterator[Difference]:
    """Nothing, or the first element that differs and by how much the elements do."""
    if old.dtype != new.dtype or old.shape != new.shape:
        yield Difference(name=name, old=_short(old), new=_short(new), size=None)
        return
    unequal = (_bits(old) != _bits(new)) & ~(old.isnan() & new.isnan())
    if unequal.any():
        places = unequal.nonzero()
        first = tuple(places[0].tolist())
        share = f"{len(places)} of {old.numel()} elements, the first at {list(first)}: "
        apart = (old[unequal].double() - new[unequal].double()).abs()
        size = math.nan if apart.isnan().any() else float(apart.max())
        yield Difference(name=name, old=f"{share}{old[first].item()!r}", new=f"{new[first].item()!r}", size=size)


def _bits(tensor: Tensor) -> Tensor:
    """The elements as whole numbers."""
    return tensor if tensor.dtype == torch.bool else tensor.contiguous().view(_BITS[tensor.element_size()])


def _distance(old: Entry, new: Entry) -> float | None:
    """|old - new| of two numbers."""
    if isinstance(old, float | int) and isinstance(new, float | int):
        return abs(old - new)
    return None


def _short(entry: Entry) -> str:
    """An entry as text."""
    if isinstance(entry, Tensor):
        return f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}"
    text = repr(entry)
    return text if len(text) <= 60 else f"{text[:57]}..."
