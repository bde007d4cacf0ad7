"""Tensors that wait in CPU memory while a GPU works: pinned, so that copies run beside the computation."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pinned(value: Tensor) -> Tensor:
    """The same values in CPU memory; page-locked when they come from a GPU. Returns when they are there."""
    if value.device.type != "cuda":
        return value.cpu()
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    host.copy_(value, non_blocking=True)
    torch.cuda.current_stream(value.device).synchronize()
    return host


def fetch(value: Tensor, device: torch.device) -> Tensor:
    """The same values on a device; from the CPU to a GPU through pinned memory, without waiting for the copy.

    The allocator keeps the pinned memory from being reused before the copy has happened.
    """
    if value.device.type == "cpu" and device.type == "cuda":
        return value.pin_memory(device).to(device, non_blocking=True)
    return value.to(device)


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """All rows of `parts`, in order; pinned if they are."""
    if not parts[0].is_pinned():
        return torch.cat(list(parts))
    rows = sum(part.shape[0] for part in parts)
    host = torch.empty((rows, *parts[0].shape[1:]), dtype=parts[0].dtype, pin_memory=True)
    return torch.cat(list(parts), out=host)
