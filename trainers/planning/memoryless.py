"""Whether a chain's pictures remember its first noise, and what a weighted KL then aims at.

The optimum of E[r(x_T)] - alpha KL has the law p_ref(x_T) exp(r(x_T) / alpha) / Z only where x_T does not depend on
x_0, as the optimum cannot change the prior of x_0. How far the two laws are apart is exact for Gaussian data, here of
N(1, .5^2) with the reward -x^2 - x and alpha .5, of which docs/verification.md has a table, on the run's own chain.
"""

import torch

from ddpo.control.diffusion.chain import gaussian_data_chain, initial_value_bias, quadratic
from ddpo.sampling.schedule import Schedule

TOLERATED = 1e-3  # nats


def initial_bias(schedule: Schedule) -> float:
    """KL of the optimum's terminal law to the tilted one, in nats, on Gaussian data."""
    mean, cov = torch.ones(1, dtype=torch.float64), torch.full((1, 1), 0.25, dtype=torch.float64)
    chain = gaussian_data_chain(mean, cov, schedule.to("cpu", torch.float64))
    return initial_value_bias(chain, quadratic(torch.tensor([[2.0]]), torch.tensor([-1.0])), alpha=0.5)[0]


def memory_notice(schedule: Schedule) -> str | None:
    """What a run whose KL has a weight should be told of its sampler, in a line; None for nothing."""
    bias = initial_bias(schedule)
    if not bias > TOLERATED:
        return None
    return (
        f"the sampler's noise ({schedule.named_stochastic_steps}) is not memoryless: pictures keep part of their first "
        "noise, so the optimum of reward - alpha KL is not the pretrained law times exp(reward / alpha), and on "
        f"Gaussian data ends {bias:.2g} nats from it; more noise (sampler.eta) or more steps bring it nearer"
    )
