"""The differential entropy of a chain of Gaussian steps, in nats.

    H(x_0, x_1, .., x_T) = H(x_0) + sum_k H(x_{k+1} | x_k),     H(x_{k+1} | x_k) = D (log std_k + log(2 pi e) / 2)

over the steps that have noise: one without noise adds nothing that its start does not decide. The sampler's std alone
sets these numbers; training moves means, and neither a step's entropy nor the path's. What training can lower is the
entropy of the images, H(x_T), through how much of the path they keep. So a bonus for the steps' entropy has no gradient
here, and "the policy's entropy has collapsed" can only be said of the images (`rewards.builtin.diversity` measures
those).

T steps, D latent dimensions.
"""

import math

from torch import Tensor

from ddpo.sampling.schedule import Schedule


def step_entropies(schedule: Schedule, *, num_dims: int) -> Tensor:
    """Entropy of each step given its start, (T,) float64 nats; -inf where a step has no noise.

    Args:
        schedule: Of the chain.
        num_dims: D.
    """
    return num_dims * (schedule.std.double().cpu().log() + _UNIT)


def path_entropy(schedule: Schedule, *, num_dims: int) -> float:
    """Entropy of the prior N(0, I) and all noisy steps, nats; arguments as for `step_entropies`."""
    noisy = step_entropies(schedule, num_dims=num_dims)[schedule.stochastic.cpu()]
    return num_dims * _UNIT + float(noisy.sum())


_UNIT = 0.5 * math.log(2 * math.pi * math.e)
"""Entropy of one standard normal number."""
