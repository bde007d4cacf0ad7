"""What a reward function returned, turned into scores, or into an error that says what to return instead."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rewards.base import TOTAL_KEY, RewardError, Scores

SIGNATURE = "(images, prompts, metadata) -> Tensor (B,)"


def read_scores(result: object, prompts: Sequence[str], *, reward: str, source: str = "") -> Scores:
    """Scores from what a reward function returned.

    Args:
        result: One number for each image in a tensor, or a dictionary of such tensors.
        prompts: `B` of them.
        reward: Name of the reward, for messages.
        source: Where it is defined, for messages.

    Raises:
        RewardError: It is something else, or not finite.
    """
    if not isinstance(result, dict):
        return Scores(total=_read(result, prompts, f"reward {reward!r}: its result", source))
    names = [name for name in result if not (isinstance(name, str) and name)]
    if names:
        raise RewardError(
            f"reward {reward!r} returned a dict with the key {names[0]!r}; keys must be non-empty strings"
        )
    if TOTAL_KEY not in result:
        raise RewardError(
            f"reward {reward!r} returned a dict without the key {TOTAL_KEY!r} (keys: {', '.join(result) or 'none'}); "
            f"the total to maximise goes under {TOTAL_KEY!r}, every other key is a component"
        )
    checked = {
        name: _read(values, prompts, f"reward {reward!r}: its {name!r}", source) for name, values in result.items()
    }
    return Scores(total=checked.pop(TOTAL_KEY), components=checked)


def _read(values: object, prompts: Sequence[str], what: str, source: str) -> Tensor:
    """Checks one `(B,)` tensor and returns it as float32."""
    size = len(prompts)
    where = f" ({source})" if source else ""
    if not isinstance(values, Tensor):
        raise RewardError(
            f"{what} must be a torch.Tensor of shape ({size},), got {_kind(values)}{where}; {_type_cure(values, size)}"
        )
    if values.is_complex():
        raise RewardError(f"{what} must be real numbers, got {values.dtype}{where}; return their real part")
    if values.shape != (size,):
        raise RewardError(
            f"{what} must have shape ({size},), one number per image, got {tuple(values.shape)}{where}; "
            f"{_shape_cure(values, size)}"
        )
    numbers = values.to(torch.float32)
    bad = (~torch.isfinite(numbers.detach())).nonzero().flatten().tolist()
    if bad:
        others = f", and for {len(bad) - 1} more of {size}" if len(bad) > 1 else ""
        raise RewardError(
            f"{what} is {values[bad[0]].item():g} for sample {bad[0]} (prompt {prompts[bad[0]]!r}){others}; scores "
            f"must be finite in float32: find the division, log or overflow in {source or 'the reward'}, or give such "
            f"images a finite lowest score"
        )
    return numbers


def _kind(values: object) -> str:
    """What somebody returned, in words."""
    if inspect.isawaitable(values):
        return "a coroutine"
    if inspect.isgenerator(values):
        return "a generator"
    name = type(values).__name__
    if isinstance(values, tuple | list) and values:
        kinds = list(dict.fromkeys(type(item).__name__ for item in values))
        return f"a {name} of {len(values)} ({', '.join(kinds[:3])})"
    return name


def _type_cure(values: object, size: int) -> str:
    """What to write instead; `torch.as_tensor` is only recommended where it was tried and gives the right shape."""
    if inspect.iscoroutine(values):
        values.close()  # nobody will await it, and Python would say so a second time
        return f"an async function is not awaited: make it a plain def {SIGNATURE}, with asyncio.run(...) inside"
    if inspect.isgenerator(values):
        return f"collect what it yields in a list and return that as a tensor: def f{SIGNATURE}"
    if values is None:
        return f"the function ends without a return: def f{SIGNATURE}"
    if isinstance(values, Mapping):
        return "return a plain dict(...) of tensors"
    try:
        tried = torch.as_tensor(values, dtype=torch.float32).shape
    except (TypeError, ValueError, RuntimeError):
        tried = None
    if tried == (size,):
        return "end with torch.as_tensor(scores, dtype=torch.float32)"
    if isinstance(values, tuple) and any(isinstance(item, Tensor) and item.shape == (size,) for item in values):
        return f"return the scores alone, or name the parts: {{{TOTAL_KEY!r}: scores, 'other': ...}}"
    if type(values).__module__.partition(".")[0] in ("pandas", "polars"):
        column = "" if type(values).__name__ == "Series" else "['the column with the scores']"
        return f"end with torch.as_tensor(result{column}.to_numpy(), dtype=torch.float32)"
    return f"return one number per image: torch.as_tensor([...], dtype=torch.float32), as def f{SIGNATURE}"


def _shape_cure(values: Tensor, size: int) -> str:
    if values.ndim == 0:
        return "it looks averaged over the batch: leave out the mean, or use .mean(dim=(1, 2, 3))"
    if values.numel() == size:
        return "add .flatten()"
    if values.ndim > 1 and values.shape[0] == size:
        return f"reduce the other dimensions, for example .flatten(1).mean(dim=1) for {tuple(values.shape)}"
    return "return one score for each image, in order"
