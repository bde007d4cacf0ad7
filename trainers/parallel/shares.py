"""How items are cut up: over processes, into batches, into updates."""

import math


def split_evenly(total: int, parts: int) -> tuple[int, ...]:
    """`parts` whole numbers that sum to `total` and differ by at most 1, larger ones first."""
    size, more = divmod(total, parts)
    return (size + 1,) * more + (size,) * (parts - more)


def chunks(total: int, size: int) -> tuple[int, ...]:
    """`total` cut into pieces of `size`, the last one smaller where it does not divide."""
    full, rest = divmod(total, size)
    return (size,) * full + ((rest,) if rest else ())


def share(total: int, *, rank: int, count: int) -> range:
    """A process's contiguous part of `total` items; sizes differ by at most one, the last ones are larger."""
    return range(total * rank // count, total * (rank + 1) // count)


def in_step(total: int, size: int, *, most: int, sharded: bool) -> tuple[int, ...]:
    """A process's batches: as many as the process with the most items has.

    Args:
        total: Items of this process; `most` or less.
        size: Largest batch.
        most: Items of the process that has the most.
        sharded: Whether all processes must have something to do in every batch.
    """
    count = math.ceil(most / size)
    if sharded and total < most:
        return split_evenly(total, count)
    full = chunks(total, size)
    return full + (0,) * (count - len(full))
