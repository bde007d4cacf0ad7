"""What advantages and the weight of the KL are divided by.

    none         1
    batch_std    S, the standard deviation of the whole batch's scores
    group_std    s_g, that of the baseline's population: the group, the prompt's remembered scores, or the batch
    std          s_g, as it was divided by before a flat group kept its KL; for runs that began so

A scale that collapses would give the KL a weight without bound, and one that is 0 none at all. So a group is flat, and
is divided by the typical s (the root mean square of s_g over the samples), where its own is below a tenth of that; and
the batch's S, or the typical s, falls to no less than a tenth within an epoch, and stays where all scores are equal to
rounding. No sample then weighs more than ten times the typical one, whatever the unit of the reward.

B samples.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ScaleRule = Literal["batch_std", "group_std", "none", "std"]

ROUNDING = 1e-6  # of the largest score: smaller deviations are those of float32
FLAT = 0.1  # of what is typical
_LEGACY_FLOOR = 1e-6


@dataclass(kw_only=True)
class SteadyScale:
    """A batch's standard deviation that cannot collapse from one epoch to the next.

    Attributes:
        value: Of the last epoch whose scores differed; None before there was one.
    """

    value: float | None = None

    def __call__(self, std: float, *, largest: float) -> float:
        """The scale of an epoch, 1 while no scores have differed yet.

        Args:
            std: The epoch's own.
            largest: Its largest absolute score.
        """
        if std > ROUNDING * largest:
            self.value = std if self.value is None else max(std, FLAT * self.value)
        return 1.0 if self.value is None else self.value


def divisor(rule: ScaleRule, scores: Tensor, spread: Tensor, steady: SteadyScale) -> Tensor:
    """What the samples of an epoch are divided by, (B,); infinite where `std` leaves a flat group without a weight.

    Args:
        rule: See the module docstring.
        scores: (B,).
        spread: Standard deviation of the population of each sample's baseline, (B,).
        steady: The scale of the epochs before; moves on.
    """
    if rule == "none":
        return torch.ones_like(scores)
    if rule == "std":
        return spread.masked_fill(spread <= _LEGACY_FLOOR, torch.inf)
    typical = scores.std(correction=0) if rule == "batch_std" else spread.square().mean().sqrt()
    scale = scores.new_tensor(steady(float(typical), largest=float(scores.abs().max())))
    if rule == "batch_std":
        return scale.expand_as(scores)
    return spread.where(spread >= FLAT * scale, scale)


def group_std(scores: Tensor, groups: Tensor) -> Tensor:
    """Population standard deviation of each sample's group, (B,)."""
    size = group_sum(torch.ones_like(scores), groups)
    deviation = scores - group_sum(scores, groups) / size
    return (group_sum(deviation.square(), groups) / size).sqrt()


def group_sum(values: Tensor, groups: Tensor) -> Tensor:
    """Sum over each sample's group of values (B,) or (B, T), in their shape."""
    ids, member = torch.unique(groups, return_inverse=True)
    return values.new_zeros(len(ids), *values.shape[1:]).index_add(0, member, values)[member]


def count_flat_groups(scores: Tensor, groups: Tensor) -> int:
    """Groups whose scores are equal to rounding, which is relative to the largest of all scores (B,)."""
    flat = group_std(scores, groups) <= ROUNDING * scores.abs().max()
    return torch.unique(groups[flat]).numel()
