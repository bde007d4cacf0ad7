"""Particles: several chains of one sample that are weighed against each other, their seeds and their resampling.

Rows of a batch are particles, those of a sample next to each other. G samples, P particles each.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from ddpo.seeds import Purpose, sample_seeds, stream

Resampling = Literal["multinomial", "systematic"]

CHOICES = 1 << 32  # second key of the numbers that decide; no candidate's noise has it


def particle_seeds(seeds: Tensor, particles: int) -> Tensor:
    """Seeds of the particles of samples, (G P,) int64; the first of each sample has the sample's own."""
    others = [sample_seeds(seed, 0, range(1, particles), purpose=Purpose.STEERING) for seed in seeds.tolist()]
    return torch.stack(
        [torch.cat([seed[None], rest]) for seed, rest in zip(seeds.cpu(), others, strict=True)]
    ).flatten()


def uniforms(seeds: Tensor, place: int, count: int) -> Tensor:
    """Numbers in [0, 1) that decide, (len(seeds), count) float64: of a seed and a place, such as a step, alone."""
    rows = [stream(seed, CHOICES, place=place).random(count) for seed in seeds.tolist()]
    return torch.stack([torch.from_numpy(row) for row in rows])


def effective_size(log_weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 of log-weights (G, P), (G,) in [1, P]."""
    return 1 / log_weights.softmax(1).square().sum(1)


def log_mean(log_weights: Tensor) -> Tensor:
    """The logarithm of the mean weight, (G,), of log-weights (G, P)."""
    return log_weights.logsumexp(1) - math.log(log_weights.shape[1])


def resample(log_weights: Tensor, numbers: Tensor, kind: Resampling) -> Tensor:
    """Which particle each one continues, (G, P) int64, P w_j of them particle j in the mean.

    Args:
        log_weights: (G, P) float64.
        numbers: Uniform in [0, 1), (G, P).
        kind: `multinomial` draws them independently; `systematic` at evenly spaced places from one number, which keeps
            the number of children within one of its mean (Kitagawa 1996).
    """
    count = log_weights.shape[1]
    places = numbers
    if kind == "systematic":
        places = (torch.arange(count, dtype=torch.float64) + numbers[:, :1]) / count
    levels = log_weights.softmax(1).cumsum(1)
    return torch.searchsorted(levels, places.contiguous(), right=True).clamp(max=count - 1)
