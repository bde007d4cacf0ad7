"""Arguments of a network as flat dictionaries, and what it returns, whatever container that comes in."""

from collections.abc import Callable, Mapping
from typing import TypeGuard

import torch
from torch import Tensor


def same(value: object, other: object) -> bool:
    """Whether two recorded arguments are equal, tensors and lists of them among them."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.shape == other.shape and torch.equal(value, other)
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        return len(value) == len(other) and all(same(*pair) for pair in zip(value, other, strict=True))
    return type(value) is type(other) and bool(value == other)


def flatten(arguments: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested dictionaries as one with dotted names; None values are dropped, as they are the defaults."""
    flat: dict[str, object] = {}
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        elif value is not None:
            flat[f"{prefix}{name}"] = value
    return flat


def unflatten(flat: Mapping[str, object]) -> dict[str, object]:
    """Inverse of `flatten`."""
    nested: dict[str, object] = {}
    for name, value in flat.items():
        *folders, leaf = name.split(".")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})  # type: ignore[assignment]
        place[leaf] = value
    return nested


def is_list_of_tensors(value: object) -> TypeGuard[list[Tensor]]:
    """Whether a value is a list of one tensor or more, none of them a single number."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(row, Tensor) and row.ndim > 0 for row in value)


def map_tensors(function: Callable[[Tensor], Tensor], value: object) -> object:
    """What a function makes of all tensors of a network's output, in the container that they came in."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):  # diffusers' outputs are mappings with a constructor by name
        return type(value)(**{name: map_tensors(function, part) for name, part in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, part) for part in value)
    return value


def first_output(value: object) -> Tensor:
    """The tensor that a network returns before all others; of a list with one a row, all rows stacked."""
    if isinstance(value, Mapping):
        value = next(iter(value.values()))
    elif isinstance(value, tuple):
        value = value[0]
    if is_list_of_tensors(value):
        value = torch.stack(value)
    assert isinstance(value, Tensor), type(value).__name__
    return value
