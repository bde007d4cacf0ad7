"""Sequences of unequal length as padded tensors, one row a sample.

Some pipelines cut or pad their prompt embeddings to the prompts of a batch. A row of a `Condition` must not depend on
its neighbours, so it keeps its own length: `name` is zero-padded at the end, (B, L, ...), and `name` + LENGTH holds
the true lengths, (B,) int64 on the CPU wherever the values are: every call of the denoiser needs them as plain
integers, and reading them back from a GPU would make it wait. B is the number of samples, L the length of the longest.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

LENGTH = "@length"
GROUP = "@group"  # numbers that are equal where rows may share a network call; on the CPU, too


def stack(rows: Sequence[Tensor]) -> Tensor:
    """Tensors of shapes (n_b, ...) as one of shape (B, L, ...), zero-padded at the end to the longest."""
    if len({row.shape for row in rows}) == 1:
        return torch.stack(tuple(rows))
    longest = max(row.shape[0] for row in rows)
    return torch.stack([_pad(row[None], longest)[0] for row in rows])


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of shapes (B_i, L_i, ...) as one with all rows, zero-padded at the end to the longest."""
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(tuple(parts))
    longest = max(part.shape[1] for part in parts)
    return torch.cat([_pad(part, longest) for part in parts])


def collate(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of B samples, each without a batch axis, as tensors of B rows; padded where there is a length."""
    values = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: stack(value) if name + LENGTH in values else torch.stack(value) for name, value in values.items()}


def join(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """All rows of several batches, in order; padded where there is a length."""
    values = {name: [part[name] for part in parts] for name in parts[0]}
    return {name: concatenate(value) if name + LENGTH in values else torch.cat(value) for name, value in values.items()}


def trim(row: dict[str, Tensor]) -> dict[str, Tensor]:
    """One sample's tensors without the padding that its neighbours caused."""
    return {name: value[: int(row[name + LENGTH])] if name + LENGTH in row else value for name, value in row.items()}


def apply(function: Callable[[Tensor], Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a function makes of the tensors, such as copies elsewhere; lengths and groups stay as they are."""
    return {name: value if name.endswith((LENGTH, GROUP)) else function(value) for name, value in tensors.items()}


def prefix_mask(lengths: Tensor, longest: int) -> Tensor:
    """Which entries are no padding, (B, longest) bool."""
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def _pad(part: Tensor, longest: int) -> Tensor:
    missing = longest - part.shape[1]
    return torch.cat([part, part.new_zeros(part.shape[0], missing, *part.shape[2:])], dim=1) if missing else part
