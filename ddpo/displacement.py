"""How far the weights have moved the steps without noise, which have no KL.

    d = sum over steps k without noise    |mean_k(x_k) - mean_ref_k(x_k)|^2 / D,      x from the policy

in squared latent units: with noise of a std, such a step's KL would be d D / (2 std^2). Steps that have noise under the
sampler, but not in the present chain, are measured in nats instead (`ddpo.path_kl.full_noise_kl`).

B is the batch, D the number of latent dimensions.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpo.trajectory import Trajectory

if TYPE_CHECKING:  # the policy loads diffusers
    from ddpo.policy import Policy


@torch.no_grad()
def displacement(policy: "Policy", trajectory: Trajectory) -> Tensor:
    """Mean square displacement of the steps that have no noise whichever are chosen, (B,) squared latent units.

    Args:
        policy: At the parameters that sampled.
        trajectory: With the states before these steps, on any chain of the policy's sampler.
    """
    policy = policy.full_noise
    total = trajectory.final.new_zeros(len(trajectory.seeds))
    for k in policy.schedule.unseen_steps:
        x = trajectory.state(k)
        own = policy(k, x, trajectory.condition).mean
        with policy.reference():
            reference = policy(k, x, trajectory.condition).mean
        total = total + (own - reference).flatten(1).square().mean(1)
    return total
