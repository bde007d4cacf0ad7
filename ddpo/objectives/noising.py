"""Which noise a clean sample gets: a step of the sampler's grid and a fresh eps, for each of its n noises.

The steps of a sample's noises follow a law over the grid, of which each noise takes its own n-th part where they are
stratified:

    grid     every step alike
    noisy    density 2 t in the share of noise t = s / (a + s): a step's share is that of the cell around its t, whose
             borders lie halfway to its neighbours, and at 1 and 0
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ddpo.sampling.schedule import Schedule
from ddpo.seeds import fill_normal, stream

Times = Literal["grid", "noisy"]


def noise_share(schedule: Schedule) -> Tensor:
    """Share t = s / (a + s) of noise at the start of every step, (T,): sigma for flow matching."""
    return schedule.s / (schedule.a + schedule.s)


def step_shares(schedule: Schedule, times: Times, *, skip: int) -> Tensor:
    """Probability of each step, (T,) float64 on the CPU.

    Args:
        schedule: Of the chain.
        times: The law.
        skip: First steps that are left out, fewer than T.
    """
    shares = torch.ones(schedule.num_steps, dtype=torch.float64)
    if times == "noisy":
        t = noise_share(schedule).double().cpu()
        borders = torch.cat([t.new_ones(1), (t[1:] + t[:-1]) / 2, t.new_zeros(1)])
        shares = borders[:-1] ** 2 - borders[1:] ** 2
    shares[:skip] = 0
    return shares / shares.sum()


def draw_noises(
    seed: int, samples: Sequence[int], slots: Sequence[int], shares: Tensor, *, strata: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Steps (N,) int64 and noises (N, *latent), on the CPU; each a function of the pass, the sample and its slot.

    Args:
        seed: Of the pass.
        samples: Seeds of the samples, N.
        slots: Which of a sample's noises, N.
        shares: Probability of each step, (T,) float64.
        strata: Into how many equal parts the law of the steps is cut, of which slot i takes part i; 1 for no cut.
        like: Latents, (N, *latent).
    """
    places, eps = torch.empty(len(slots), dtype=torch.float64), torch.empty(like.shape)
    for i, (sample, slot) in enumerate(zip(samples, slots, strict=True)):
        random = stream(seed, sample, place=slot)
        places[i] = random.random()
        fill_normal(eps[i], random)
    places = (torch.tensor(slots) % strata + places) / strata
    ends = shares.cumsum(0)
    last = int(torch.nonzero(shares)[-1])
    return torch.searchsorted(ends / ends[-1], places, right=True).clamp(max=last), eps
