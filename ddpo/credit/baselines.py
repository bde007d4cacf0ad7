"""What scores are compared with: means over other samples, over other groups, and what later steps cost.

B samples, T steps.
"""

import torch
from torch import Tensor

from ddpo.credit.advantage_scale import group_sum
from ddpo.validation import UserError


def mean_square_ratio(values: Tensor, others: Tensor) -> float:
    """The mean square of some values over that of others; NaN where those are all 0."""
    below = float(others.square().mean())
    return float(values.square().mean()) / below if below > 0 else float("nan")


def cost_to_go(kl: Tensor, alpha: float) -> Tensor:
    """What the steps after k cost, alpha * sum_{j > k} KL_j, (B, T), in reward units."""
    from_here = kl.flip(1).cumsum(1).flip(1)
    return alpha * (from_here - kl)


def rarity(distances: Tensor, groups: Tensor) -> Tensor:
    """Each distance (B,) over the mean of its group; 1 where all are 0."""
    mean = group_sum(distances, groups) / group_sum(torch.ones_like(distances), groups)
    return torch.where(mean > 0, distances / mean, torch.ones_like(mean))


def leave_group_out(values: Tensor, groups: Tensor) -> Tensor:
    """Each value (B,) minus the mean over the samples of all other groups.

    Raises:
        UserError: There is one group alone.
    """
    count = group_sum(torch.ones_like(values), groups)
    others = len(values) - count
    if not others.all():
        raise UserError(
            "a reward that compares the images of a group needs at least two groups an epoch, got one: the other "
            "groups are its baseline; raise batch.samples_per_epoch to twice batch.group_size"
        )
    return values - (values.sum() - group_sum(values, groups)) / others


def leave_one_out(values: Tensor, groups: Tensor, twins: Tensor | None = None) -> Tensor:
    """Each value minus the mean of the others of its group: (value - mean) * G / (G - 1), 0 in groups of one.

    Args:
        values: (B,) or (B, T).
        groups: (B,) int64.
        twins: Ids of samples that are left out together, each within a group, (B,) int64; None for each alone.
    """
    if twins is not None:
        ones = torch.ones_like(groups).to(values).reshape(-1, *[1] * (values.ndim - 1))
        others = group_sum(ones, groups) - group_sum(ones, twins)
        assert bool((others > 0).all()), "a group is more than samples that were drawn together"
        return values - (group_sum(values, groups) - group_sum(values, twins)) / others
    _, member, count = torch.unique(groups, return_inverse=True, return_counts=True)
    size = count[member].to(values).reshape(-1, *[1] * (values.ndim - 1))
    return (values - group_sum(values, groups) / size) * size / (size - 1).clamp(min=1)
