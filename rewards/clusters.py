"""The standard error of a mean over draws that come in clusters, such as several pictures of one caption.

    se^2 = C / (C - 1)  sum_c ( sum_{i in c} (y_i - mean) )^2 / n^2        (Liang & Zeger 1986, for a mean)

Pictures of a caption resemble each other: as draws of captions they count for less than their number says. With an
intraclass correlation rho and m pictures a caption the error is sqrt(1 + (m - 1) rho) times that of independent draws.
With one draw a cluster the formula is the usual one.

Legend: `n` draws, `C` clusters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def standard_error(values: Tensor, clusters: Tensor | None = None) -> float | None:
    """Standard error of the mean of `(n,)` values; None for a single value.

    Args:
        values: Draws.
        clusters: Ids of the draws' clusters, `(n,)` int64; None for independent draws. A single cluster is a population
            of its own, of independent draws.
    """
    values = values.double().flatten()
    if clusters is None or len(torch.unique(clusters)) == 1:
        clusters = torch.arange(len(values), device=values.device)
    _, member = torch.unique(clusters, return_inverse=True)
    count = int(member.max()) + 1 if len(values) else 0
    if count < 2:
        return None
    sums = values.new_zeros(count).index_add(0, member, values - values.mean())
    return math.sqrt(count / (count - 1) * float(sums.square().sum())) / len(values)
