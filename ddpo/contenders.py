"""Several next states from one state: what a preference about a single step compares.

    x_{k+1}^j = mean_k(x_k) + std_k z_j,    j = 0 .. M-1;    j = 0 is the chain's own, drawn like the others

Since all are drawn alike, the chain goes on from a random one of them. The contended steps are the last C that have
noise. B chains, M contenders.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpo.seeds import fill_normal, stream
from ddpo.steering.base import weights_of
from ddpo.trajectory import Trajectory

if TYPE_CHECKING:  # the policy loads diffusers
    from ddpo.policy import Policy

NOISE = 1  # second key of their noise; that of the chain itself has 0


@torch.no_grad()
def with_contenders(trajectory: Trajectory, *, steps: int, count: int) -> Trajectory:
    """The same chains with the states that they might have gone on with.

    Args:
        trajectory: With all states and means.
        steps: C.
        count: M, at least 2.
    """
    assert trajectory.means is not None, "sampled with means"
    decisions = trajectory.schedule.stochastic_steps
    contended = []
    for number in range(len(decisions) - steps, len(decisions)):
        k, mean = decisions[number], trajectory.means[:, number]
        noise = _noise(trajectory.seeds, k, count - 1, like=mean).to(mean)
        others = mean[:, None] + trajectory.schedule.std[k] * noise
        contended.append(torch.cat([trajectory.state(k + 1)[:, None], others], dim=1))
    return replace(trajectory, contenders=torch.stack(contended, dim=1))


@torch.no_grad()
def predicted_clean(policy: "Policy", trajectory: Trajectory, *, step: int, contender: int) -> Tensor:
    """The clean latents that the policy sees in contenders, (B, *latent): themselves, after the last step.

    Args:
        policy: On the chain.
        trajectory: With contenders.
        step: Which of the C contended ones.
        contender: Which of the M.
    """
    assert trajectory.contenders is not None
    after = trajectory.contended[step] + 1
    x = trajectory.contenders[:, step, contender]
    if after == policy.schedule.num_steps:
        return x
    with weights_of(policy, after):
        return policy.predict(after, x, trajectory.condition).x0


def _noise(seeds: Tensor, k: int, count: int, *, like: Tensor) -> Tensor:
    """Standard normal, (B, count, *latent) on the CPU: of the sample's seed and the step alone."""
    noise = torch.empty(len(seeds), count, *like.shape[1:])
    for row, seed in zip(noise, seeds.tolist(), strict=True):
        fill_normal(row, stream(seed, NOISE, place=k))
    return noise
