"""Samples denoising chains from a policy, with the log-probability of every step.

Sample b is a function of the policy, its condition and seeds[b]: not of the batch it is in, its place there or the
process that draws it (to the rounding of the network's batched kernels).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpo.gaussian import Gaussian
from ddpo.trajectory import Condition, Trajectory

if TYPE_CHECKING:
    from ddpo.policy import Policy


@torch.no_grad()
def rollout(
    policy: "Policy",
    condition: Condition,
    seeds: Tensor,
    *,
    with_kl: bool = False,
    guided: bool = True,
    latents: Tensor | None = None,
) -> Trajectory:
    """Samples B chains of T steps.

    Args:
        policy: The policy.
        condition: B rows.
        seeds: One seed a sample, (B,) int64.
        with_kl: Whether to measure the KL to the pretrained model at every stochastic step: one more pass each.
        guided: Whether the recorded log-probabilities and KL are those of the guided policy, as sampled, or of its
            conditional branch alone. Sampling is guided either way.
        latents: Initial latents, (B, *latent); default the prior's, from the seeds.

    Returns:
        The trajectories on the policy's device, float32 but for the log-probabilities.
    """
    noise = policy.noise(seeds)
    x = noise[:, 0] if latents is None else latents.to(noise)
    states, log_probs = [x], []
    steps: dict[int, Gaussian] = {}
    zeros = x.new_zeros(x.shape[0], dtype=torch.float64)
    stochastic = policy.schedule.stochastic_steps
    for k in range(policy.schedule.num_steps):
        if guided:
            sampled = recorded = policy(k, x, condition)
        else:
            sampled, recorded = policy.both(k, x, condition)
        if k not in stochastic:
            states.append(sampled.mean)
            log_probs.append(zeros)
        else:
            if with_kl:
                steps[k] = recorded
            states.append(sampled.sample(noise[:, k + 1]))
            log_probs.append(recorded.log_prob(states[-1]))
        x = states[-1]
    latents = torch.stack(states, dim=1)
    return Trajectory(
        latents=latents,
        log_probs=torch.stack(log_probs, dim=1),
        kl=_kl_to_reference(policy, latents, condition, steps, guided=guided) if with_kl else None,
        condition=condition,
        seeds=seeds,
        schedule=policy.schedule,
    )


@torch.no_grad()
def path_kl(policy: "Policy", trajectory: Trajectory, *, guided: bool = True) -> Tensor:
    """KL(policy || reference) at the visited states of trajectories, (B, T) nats, 0 at deterministic steps.

    Its sum over steps estimates the path KL without bias, at the parameters that sampled the trajectories (the
    discrete Girsanov theorem; Fan et al., arXiv:2305.16381, lemma 4.1).
    """
    latents, condition = trajectory.latents, trajectory.condition
    stochastic = trajectory.schedule.stochastic_steps
    steps = {k: policy(k, latents[:, k], condition, guided=guided) for k in stochastic}
    return _kl_to_reference(policy, latents, condition, steps, guided=guided)


def _kl_to_reference(
    policy: "Policy", latents: Tensor, condition: Condition, steps: Mapping[int, Gaussian], *, guided: bool
) -> Tensor:
    """KL of the given steps' distributions to the pretrained model's, (B, T) nats, 0 elsewhere.

    Switching the adapter off walks over all layers: it is done once for all steps.
    """
    kl = latents.new_zeros(latents.shape[0], latents.shape[1] - 1)
    with policy.reference():
        for k, step in steps.items():
            kl[:, k] = step.kl(policy(k, latents[:, k], condition, guided=guided))
    return kl


def sample_seeds(run_seed: int, epoch: int, indices: Sequence[int]) -> Tensor:
    """Seeds of the given samples of an epoch, (len(indices),) int64, non-negative.

    One SplitMix64 step (Steele et al., OOPSLA 2014) per coordinate: distinct (run, epoch, index) give distinct,
    unrelated generators, whatever the number of processes.
    """
    base = _mix(_mix(run_seed & _MASK) ^ (epoch & _MASK))
    return torch.tensor([_mix(base ^ _mix(index)) >> 1 for index in indices], dtype=torch.int64)


_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
