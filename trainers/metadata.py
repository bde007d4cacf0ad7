"""What the metadata of prompts may hold: no number that is NaN or infinite.

Such a number is no JSON, so that no reward server could be sent it, and it passes into scores unseen.
"""

import math
from collections.abc import Mapping, Sequence, Set
from numbers import Integral, Real

import numpy as np
import torch


def unsendable(value: object) -> str | None:
    """Why a value cannot be the metadata of a prompt, as the end of a sentence; None where it can."""
    try:
        found = _not_finite(value)
    except RecursionError:
        return "is nested without end"
    return None if found is None else f"must hold finite numbers, got {found}; leave the key out, or write null"


def _not_finite(value: object) -> float | None:
    """The first number that is not finite, at any depth of mappings, lists, arrays and tensors."""
    if isinstance(value, str | bytes | Integral):
        return None
    if isinstance(value, Real):
        return None if math.isfinite(value) else float(value)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy() if value.dtype != torch.bfloat16 else value.detach().cpu().float().numpy()
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "f":
            wrong = value[~np.isfinite(value)]
            return float(wrong[0]) if wrong.size else None
        return _not_finite(value.tolist()) if value.dtype.kind == "O" else None
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, Sequence | Set):
        return None
    return next((found for item in value if (found := _not_finite(item)) is not None), None)
