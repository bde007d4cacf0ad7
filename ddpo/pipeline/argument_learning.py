"""Tells the arguments of a denoiser's call apart, by calls with 1, 2 and 3 prompts, the last of them long.

What follows the number of rows belongs to the rows; what follows the length of a prompt, too, is ragged; what has no
rows but another value for another prompt is common to the rows that share it (`ddpo.pipeline.arguments`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpo.pipeline.arguments import Arguments, Mask, PerRow
from ddpo.pipeline.nested import is_list_of_tensors, same
from ddpo.pipeline.tracing import Call, Step, UntraceableError


def learn_arguments(network: str, one: Step, two: Step, three: Step, *, alone: bool = False) -> Arguments:
    """Tells the arguments apart by what follows the rows, the prompts, and nothing.

    Args:
        network: Class of the denoiser.
        one: The first step of a run with one prompt.
        two: The same with two prompts.
        three: The same with three, the last of them long.
        alone: Whether the three runs had one prompt each, the last of them long; then a leading axis of as many
            entries as the latents have rows is taken for theirs.

    Raises:
        UntraceableError: An argument depends on the prompts in a way that no row and no group holds.
    """
    calls = [call for step in (one, two, three) for call in step.calls]
    names = dict.fromkeys(name for call in calls for name in call.arguments)
    rows: dict[str, PerRow] = {}
    common: dict[str, bool] = {}
    shared: dict[str, object] = {}
    repeated: dict[str, object] = {}
    for name in names:
        found = [(call.arguments[name], call.latents.shape[0]) for call in calls if name in call.arguments]
        spec = _per_row(found, alone=alone)
        values = [value for value, _ in found]
        if spec is not None:
            rows[name] = spec
        elif all(_repeats(value, values[0], size) for value, size in found):
            repeated[name] = values[0][0]  # type: ignore[index]
        elif len(found) == len(calls) and all(same(value, values[0]) for value in values):
            shared[name] = values[0]
        elif len(found) == len(calls) and all(_numeric(value) for value in values):
            common[name] = not isinstance(values[0], Tensor)
        else:
            raise UntraceableError(
                f"argument {name} of {network} depends on the prompts or differs between the guidance branches, but "
                "has no row for each sample"
            )
    mask = _find_mask(network, calls, rows, len(one.calls))
    return Arguments(network=network, rows=rows, common=common, shared=shared, repeated=repeated, mask=mask)


def _per_row(found: Sequence[tuple[object, int]], *, alone: bool) -> PerRow | None:
    """Where the rows are, if they are anywhere."""
    if all(is_list_of_tensors(value) and len(value) == size for value, size in found):
        return PerRow(listed=True, ragged=0)
    layered = all(_is_layered(value) for value, _ in found)
    if layered:
        found = [(torch.stack(value), size) for value, size in found]  # type: ignore[arg-type]
    tensors = [(value, size) for value, size in found if isinstance(value, Tensor) and value.ndim > 0]
    if len(tensors) != len(found) or len({value.ndim for value, _ in tensors}) != 1:
        return None
    places = (
        [(1, int(layered))]
        if alone
        else [(n, axis) for axis in range(tensors[0][0].ndim) for n in _entries(tensors, axis)]
    )
    fitting = [(n, axis) for n, axis in places if all(value.shape[axis] == n * size for value, size in tensors)]
    if not fitting:
        return None
    entries, axis = min(fitting)
    plain = PerRow(axis=axis, entries=entries)
    shapes = [plain.take(value, size).shape[1:] for value, size in tensors]
    uneven = [index for index, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    if len(uneven) > 1:
        return None
    return PerRow(axis=axis, entries=entries, layered=layered, ragged=uneven[0] if uneven else None)


def _is_layered(value: object) -> bool:
    """Whether a value is a list of tensors of one shape."""
    return is_list_of_tensors(value) and len({row.shape for row in value}) == 1


def _entries(tensors: Sequence[tuple[Tensor, int]], axis: int) -> list[int]:
    """How many entries an axis has for each row of the first of these, if that is a whole number."""
    value, size = tensors[0]
    return [value.shape[axis] // size] if value.shape[axis] and value.shape[axis] % size == 0 else []


def _find_mask(network: str, calls: Sequence[Call], rows: dict[str, PerRow], branches: int) -> Mask | None:
    """The mask that covers the ragged arguments; without one, or with several, rows of equal length go together."""
    uneven = {name for name, spec in rows.items() if spec.ragged is not None and not spec.listed}
    partial = [name for name in rows if any(name not in call.arguments for call in calls)]
    masks = [name for name in uneven if _is_mask(name, calls)]
    absent = [name for name in partial if name not in masks]
    if absent:
        raise UntraceableError(f"{network} is given {', '.join(absent)} for some prompts, and for others not")
    if len(masks) != 1 or len(uneven) == 1:
        if partial:
            raise UntraceableError(f"{network} is given {len(masks)} masks ({', '.join(masks)}); one can be understood")
        return None
    (name,) = masks
    given = [call for call in calls if name in call.arguments]
    sizes = {
        other: [_length(rows[other], call, other) == _length(rows[name], call, name) for call in given]
        for other in uneven - {name}
    }
    covers = frozenset(other for other, equal in sizes.items() if all(equal))
    if not covers:
        return None
    alone = [
        rows[name].take(call.arguments[name], call.latents.shape[0])
        for call in calls[:branches]
        if name in call.arguments
    ]
    value = given[0].arguments[name]
    assert isinstance(value, Tensor), "a mask is a tensor"
    return Mask(
        name=name,
        covers=covers,
        dtype=value.dtype,
        when_full=all(name in call.arguments for call in calls[:branches]),
        padded=any(not mask.bool().all(1).any() for mask in alone),
    )


def _is_mask(name: str, calls: Sequence[Call]) -> bool:
    values = [call.arguments[name] for call in calls if name in call.arguments]
    return all(isinstance(v, Tensor) and v.ndim == 2 and not v.is_floating_point() for v in values)


def _length(spec: PerRow, call: Call, name: str) -> int:
    return spec.take(call.arguments[name], call.latents.shape[0]).shape[1]


def _repeats(value: object, first: object, rows: int) -> bool:
    """Whether a value is a list of `rows` copies of the first entry of `first`, which is no tensor."""
    if not isinstance(value, list) or not isinstance(first, list) or not first or isinstance(first[0], Tensor):
        return False
    return value == first[:1] * rows


def _numeric(value: object) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, int | float) and not isinstance(value, bool))
