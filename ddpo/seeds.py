"""Where all random numbers of a run come from: of its seed, an epoch and an index alone, on any device.

A seed is 63 bits: a hash of (run seed, epoch, index) above three bits that say for what it is drawn, so that training
and evaluation never share noise, whatever their seeds are.

    seed   = hash_60(run seed, epoch, index) | purpose
    stream = Philox4x64-10 (Salmon et al., SC 2011), key (seed, second), counter (draw, 0, 0, place)

Philox is a bijection of the counter under a key of 128 bits: other keys and other places are other streams, none a
later part of another. torch's generator on the CPU would not do: it takes the low 32 bits of a seed alone.

A seed below 0 stands for the negated noise of its complement: the samples of `seed` and `~seed` are antithetic. How
the noises of a group belong together is one of

    independent   every sample has its own
    antithetic    samples 2j and 2j + 1 have opposite ones, in the initial state and in every step
    shared        the samples of a group start from one initial state; their steps have noises of their own
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Literal

import numpy as np
import torch
from torch import Tensor

NOISE = "philox4x64"
"""Name of the noise; a checkpoint records it, since a seed means other samples under another."""


class Purpose(IntEnum):
    """What a seed is drawn for: at most eight."""

    TRAINING = 0
    EVALUATION = 1
    PASS = 2
    SITES = 3
    STEPS = 4
    PROMPTS = 5
    GLOBAL = 6
    STEERING = 7


def sample_seeds(run_seed: int, epoch: int, indices: Sequence[int], *, purpose: Purpose = Purpose.TRAINING) -> Tensor:
    """Seeds of the given samples of an epoch, (len(indices),) int64, non-negative, whatever the number of processes.

    The hash is a SplitMix64 step (Steele et al., OOPSLA 2014) per coordinate. Seeds of different purposes differ; two
    of n of the same purpose are equal with probability n^2 / 2^61, 5e-7 for a million.

    Args:
        run_seed: Of the run; its low 64 bits count.
        epoch: Finished epochs.
        indices: Places in the epoch, over all processes.
        purpose: What the noise is for.
    """
    base = _mix(_mix(run_seed & _MASK) ^ (epoch & _MASK))
    hashed = [_mix(base ^ _mix(index)) for index in indices]
    return torch.tensor([value >> 4 << 3 | purpose for value in hashed], dtype=torch.int64)


def one_seed(run_seed: int, epoch: int, index: int = 0, *, purpose: Purpose) -> int:
    """A single seed, as from `sample_seeds`."""
    return int(sample_seeds(run_seed, epoch, [index], purpose=purpose))


def stream(seed: int, second: int = 0, *, place: int = 0) -> np.random.Generator:
    """The random numbers of a seed: 2^64 blocks of its own.

    Args:
        seed: In [-2^63, 2^64), of which those below 0 count modulo 2^64.
        second: Another such seed, where a stream belongs to two.
        place: In [0, 2^64): which of the streams of the seeds.
    """
    key = np.array([seed & _MASK, second & _MASK], dtype=np.uint64)
    counter = np.array([0, 0, 0, place], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def fill_normal(target: Tensor, random: np.random.Generator) -> None:
    """Fills a contiguous float32 tensor on the CPU with standard normal numbers, in order."""
    random.standard_normal(out=target.numpy(), dtype=np.float32)


def fill_noise(target: Tensor, seeds: Tensor) -> None:
    """Fills each row of a contiguous float32 tensor on the CPU with the noise of its sample's seed.

    Args:
        target: (B, ...).
        seeds: (B,) int64; of one below 0 the noise is that of its complement, negated.
    """
    bits = np.random.Philox(key=0)
    random, start = np.random.Generator(bits), bits.state
    for row, seed in zip(target.numpy(), seeds.tolist(), strict=True):
        start["state"]["key"][0] = max(seed, ~seed)
        bits.state = start  # a tenth of what another generator costs
        random.standard_normal(out=row, dtype=np.float32)
    target[seeds < 0] *= -1


def random_orders(num: int, size: int, random: np.random.Generator) -> Tensor:
    """Independent random permutations of `range(size)`, (num, size) int64."""
    return torch.from_numpy(random.random((num, size)).argsort(1))


GroupNoise = Literal["independent", "antithetic", "shared"]


def group_seeds(
    kind: GroupNoise, run_seed: int, epoch: int, indices: Sequence[int], *, group_size: int
) -> tuple[Tensor, Tensor]:
    """Seeds of the given samples of an epoch, and seeds of their initial states, (len(indices),) int64 each.

    Args:
        kind: How the noises of a group belong together.
        run_seed: Of the run.
        epoch: Finished epochs.
        indices: Places in the epoch; sample i is of group i // group_size.
        group_size: Samples of a group, even for `antithetic`.
    """
    places = list(indices)
    if kind == "antithetic":
        seeds = sample_seeds(run_seed, epoch, [place - place % 2 for place in places])
        seeds = torch.where(torch.tensor(places) % 2 == 1, ~seeds, seeds)
        return seeds, seeds
    seeds = sample_seeds(run_seed, epoch, places)
    if kind == "independent":
        return seeds, seeds
    return seeds, sample_seeds(run_seed, epoch, [place - place % group_size for place in places])


_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
