"""What passes between rewards and those who call them: scores, their errors, and the checks on both sides.

A reward scores finished images. It is any callable `(images, prompts, metadata) -> scores`: images `(B, 3, H, W)`
float32 in [0, 1], or videos `(B, F, 3, H, W)` where it declares `frames`, `B` prompts, `B` metadata dictionaries
(whatever the prompt source attached), scores `(B,)`, higher is better. It may instead return a dictionary of such
tensors in which `"score"` is the total and every other key a component to report. `rewards.reward` calls it.

Legend: `B` batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Metadata = Mapping[str, object]
RewardFunction = Callable[[Tensor, list[str], list[Metadata]], "Tensor | dict[str, Tensor]"]

TOTAL_KEY = "score"


class UserError(ValueError):
    """Something that the user can mend; the message says what was received and the cure."""


class RewardError(UserError):
    """A reward failed or returned something that is not a score for every image."""


class MissingPackageError(UserError, ImportError):
    """A package that only some rewards need is not installed; the message says how to get it."""


def renumber_sample(error: RewardError, numbers: Sequence[int]) -> None:
    """Gives the sample that an error names, by its place in a batch, its number among more samples.

    Args:
        error: Of a batch; changed where it says `for sample 3 (prompt ...)`.
        numbers: Of the batch's samples.
    """
    named = _SAMPLE.search(str(error))
    if named and int(named[0]) < len(numbers):
        text = str(error)
        error.args = (f"{text[: named.start()]}{numbers[int(named[0])]}{text[named.end() :]}",)


_SAMPLE = re.compile(r"(?<=for sample )\d+(?= \(prompt )")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of one batch of images.

    Attributes:
        total: `(B,)` float32, the number to maximise.
        components: Name to `(B,)` float32, parts of the total worth logging; empty when the reward has none.
    """

    total: Tensor
    components: dict[str, Tensor] = field(default_factory=dict)


def check_inputs(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
    """Raises ValueError unless these are images or videos in [0, 1], each with a prompt and a metadata dictionary."""
    if not isinstance(images, Tensor):
        raise ValueError(f"images must be a torch.Tensor (B, 3, H, W), got {type(images).__name__}")
    if images.ndim not in (4, 5) or images.shape[-3] != 3 or 0 in images.shape:
        raise ValueError(f"images must have shape (B, 3, H, W), none of them 0, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point in [0, 1], got {images.dtype}; divide uint8 images by 255")
    low, high = (float(bound) for bound in images.detach().aminmax())
    if not (low >= 0.0 and high <= 1.0):  # also true for NaN
        raise ValueError(f"images must lie in [0, 1], got values in [{low:g}, {high:g}]; clamp after decoding")
    for label, values in (("prompts", prompts), ("metadata", metadata)):
        if isinstance(values, str) or len(values) != images.shape[0]:
            count = "a single string" if isinstance(values, str) else str(len(values))
            raise ValueError(f"{label} must have one entry for each of the {images.shape[0]} images, got {count}")


def concatenate(parts: Sequence[Scores], *, reward: str = "") -> Scores:
    """The scores of several batches, at least one, as those of one.

    Args:
        parts: Of the batches, in order.
        reward: Whose they are; empty for a sum, whose components name their rewards.

    Raises:
        RewardError: The batches have different components.
    """
    components = join_components([part.components for part in parts], reward=reward)
    return Scores(total=torch.cat([part.total for part in parts]), components=components)


def join_components(parts: Sequence[Mapping[str, Tensor]], *, reward: str = "") -> dict[str, Tensor]:
    """The components of several batches, at least one, as those of one; see `concatenate`."""
    for part in parts:
        check_components(parts[0], part, reward=reward)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def check_components(first: Iterable[str], names: Iterable[str], *, reward: str = "") -> None:
    """Raises RewardError unless a batch reports the same components as the first one, in whatever order.

    Args:
        first: Of the first batch.
        names: Of another batch.
        reward: Whose they are; empty for a sum, whose components `<reward>/<component>` name their rewards.
    """
    expected, got = sorted(set(first)), sorted(set(names))
    different = sorted(set(expected) ^ set(got))
    if not different:
        return
    if not reward:
        reward = different[0].partition("/")[0]
        expected, got = ([name for name in own if name.startswith(f"{reward}/")] for own in (expected, got))
    raise RewardError(
        f"reward {reward!r} reports other components for one batch ({', '.join(got) or 'none'}) than for the first "
        f"({', '.join(expected) or 'none'}); return the same keys for every batch, with 0 where one has no meaning"
    )


def total_and_parts(total: Tensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a reward made of others returns: its own total, and theirs as components.

    A part that is itself called `score` is reported as `raw/score`, which no other part can be called.
    """
    return {TOTAL_KEY: total, **{f"raw/{name}" if name == TOTAL_KEY else name: part for name, part in parts.items()}}


def group_rows(prompts: Sequence[str], groups: Sequence[int] | None) -> list[list[int]]:
    """Rows of each group, in the order in which groups first occur.

    Args:
        prompts: `B` texts, which name the groups when `groups` is None.
        groups: `B` ids, or None.

    Raises:
        ValueError: The ids are not one for each prompt.
    """
    if groups is not None and len(groups) != len(prompts):
        raise ValueError(f"groups must have one id for each of the {len(prompts)} images, got {len(groups)}")
    rows: dict[str | int, list[int]] = {}
    ids: Sequence[str | int] = prompts if groups is None else groups
    for b, key in enumerate(ids):
        rows.setdefault(key, []).append(b)
    return list(rows.values())
