"""Which samples of an epoch are compared with each other, from their scores.

    best_and_worst     the best of a group against its worst; all samples of the group stand for this one pair
    opposite_ranks     the best against the worst, the second best against the second worst, and so on: every sample
                       stands for its own pair, but for the middle one of an odd group

A pair whose scores are equal to rounding says nothing and is skipped, as is one whose scores differ by less than a
margin: its weight is 0, and the others' are such that all weights have the mean 1.

N samples of an epoch, over all processes; ids of groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpo.credit.advantage_scale import ROUNDING


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The pair that each of N samples stands for, on the CPU.

    Attributes:
        better: Its sample of the larger score, (N,) int64.
        worse: Its sample of the smaller score, (N,) int64.
        weight: 0 for pairs that are skipped, else the same for all, with mean 1 over the samples, (N,) float64; all 0
            where every pair is skipped.
    """

    better: Tensor
    worse: Tensor
    weight: Tensor


def best_and_worst(scores: Tensor, groups: Tensor, *, margin: float = 0.0) -> Pairs:
    """The best sample of each group against its worst.

    Args:
        scores: (N,).
        groups: (N,) int64.
        margin: Pairs whose scores differ by less are skipped.
    """
    order, first, last, _ = _ranks(scores, groups)
    return _weighed(scores, better=order[first], worse=order[last], margin=margin)


def opposite_ranks(scores: Tensor, groups: Tensor, *, margin: float = 0.0) -> Pairs:
    """Each sample of a group against the one of the opposite rank; arguments as for `best_and_worst`."""
    order, first, last, place = _ranks(scores, groups)
    opposite = first + last - place
    return _weighed(
        scores,
        better=order[torch.minimum(place, opposite)],
        worse=order[torch.maximum(place, opposite)],
        margin=margin,
    )


def _ranks(scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The samples in the order of their groups and falling scores; of each sample its group's places there, its own."""
    scores, groups = scores.cpu(), groups.cpu()
    falling = scores.argsort(descending=True, stable=True)
    order = falling[groups[falling].argsort(stable=True)]
    _, member, count = torch.unique(groups, return_inverse=True, return_counts=True)
    end = count.cumsum(0)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return order, (end - count)[member], (end - 1)[member], place


def _weighed(scores: Tensor, *, better: Tensor, worse: Tensor, margin: float) -> Pairs:
    scores = scores.cpu().double()
    gap = scores[better] - scores[worse]
    counts = ((gap >= margin) & (gap > ROUNDING * scores.abs().max())).double()
    return Pairs(better=better, worse=worse, weight=counts / counts.mean().clamp(min=1 / len(counts)))


def preference_loss(logits: Tensor) -> Tensor:
    """-log sigmoid of log-odds for the better of each pair, (N,)."""
    return torch.nn.functional.softplus(-logits)


def compared(logits: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """What is reported of N pairs: their means are over those that are not skipped.

    Args:
        logits: Log-odds for the better of each, (N,).
        weight: Of each pair, with mean 1, (N,).
    """
    logits = logits.detach()
    return {
        "pair_accuracy": weight * (0.5 + 0.5 * logits.sign()),
        "pair_logit": weight * logits,
        "pairs_skipped": (weight == 0).to(logits),
    }
