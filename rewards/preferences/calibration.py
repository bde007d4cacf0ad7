"""Are the stated preferences right as often as they say? Temperature, reliability, expected calibration error.

    p = sigmoid((r(a) - r(b)) / T),   T minimises the negative log-likelihood on the validation pairs (Guo et al. 2017)
    ECE = sum_i (n_i / n) |mean p in bin i - share preferred in bin i|          over bins of p (Naeini et al. 2015)

A pair and its mirror image say the same, so pairs are turned such that p >= 1/2: p is then the confidence, the share
preferred the accuracy. Ties count 1/2. The ECE takes absolute values, so that few pairs make one of probabilities that
are exactly right, too: that floor, its mean over labels drawn from p, is stated beside it. Legend: `M` pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from rewards.clusters import standard_error
from rewards.preferences.fitting import negative_log_likelihood

NUM_BINS = 10
NUM_DRAWS = 200
_LOG_TEMPERATURES = (math.log(0.05), math.log(20.0))


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Pairs of similar confidence.

    Attributes:
        confidence: Mean p in [1/2, 1].
        accuracy: Share whose label agrees, ties counted 1/2.
        count: Pairs.
    """

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well differences of scores foretell labels.

    Attributes:
        num_pairs: `M`.
        accuracy: Share of the pairs that are no ties whose better picture scores higher.
        accuracy_error: Its standard error, the pairs of one comparison counting as one draw; None without such pairs.
        loss: Negative log-likelihood, nats a pair (log 2 = 0.693 knows nothing).
        ece: Expected calibration error in [0, 1/2].
        ece_floor: Its mean if the probabilities were right, at this number of pairs.
        bins: The reliability diagram.
    """

    num_pairs: int
    accuracy: float | None
    accuracy_error: float | None
    loss: float
    ece: float
    ece_floor: float
    bins: tuple[Bin, ...]


def fit_temperature(difference: Tensor, label: Tensor) -> float:
    """The T in [0.05, 20] of the module docstring, for `(M,)` differences and labels in [0, 1]."""
    difference, label = difference.double(), label.double()

    def loss(log_temperature: float) -> float:
        return float(negative_log_likelihood(difference * math.exp(-log_temperature), label).mean())

    found = minimize_scalar(loss, bounds=_LOG_TEMPERATURES, method="bounded")
    return math.exp(float(found.x))


def measure(difference: Tensor, label: Tensor, comparisons: Tensor | None = None) -> Quality:
    """Quality of calibrated differences `(M,)` (already divided by T) on labels in {0, 0.5, 1}.

    Args:
        difference: r(a) - r(b) over T.
        label: 1 where a is preferred, 0 where b is, 0.5 for a tie.
        comparisons: Numbers of what the pairs belong to, `(M,)`: pairs that share pictures are no draws of their own.
            None takes the pairs as independent.
    """
    difference, label = difference.double(), label.double()
    decided = label != 0.5
    right = ((difference > 0) == (label > 0.5))[decided].double()
    right[(difference == 0)[decided]] = 0.5
    accuracy = float(right.mean()) if len(right) else None
    error = standard_error(right, None if comparisons is None else comparisons[decided]) if len(right) else None
    bins = _reliability(difference, label)
    return Quality(
        num_pairs=len(label),
        accuracy=accuracy,
        accuracy_error=error,
        loss=float(negative_log_likelihood(difference, label).mean()),
        ece=_ece(bins),
        ece_floor=_ece_floor(difference),
        bins=bins,
    )


def _ece(bins: Sequence[Bin]) -> float:
    total = sum(entry.count for entry in bins)
    return sum(entry.count * abs(entry.confidence - entry.accuracy) for entry in bins) / total


def _ece_floor(difference: Tensor) -> float:
    """Mean ECE of labels that are drawn from the stated probabilities."""
    generator = torch.Generator().manual_seed(0)
    chances = difference.sigmoid()
    draws = (torch.rand(NUM_DRAWS, len(chances), generator=generator, dtype=torch.float64) < chances).double()
    return sum(_ece(_reliability(difference, labels)) for labels in draws) / NUM_DRAWS


def _reliability(difference: Tensor, label: Tensor) -> tuple[Bin, ...]:
    """Bins of equal width over confidences in [1/2, 1], empty ones left out."""
    confidence = difference.abs().sigmoid()
    agreement = torch.where(difference > 0, label, 1 - label)
    agreement[difference == 0] = 0.5
    place = ((confidence - 0.5) * 2 * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    found = []
    for number in range(NUM_BINS):
        inside = place == number
        if inside.any():
            mean = float(confidence[inside].mean())
            found.append(Bin(confidence=mean, accuracy=float(agreement[inside].mean()), count=int(inside.sum())))
    return tuple(found)
