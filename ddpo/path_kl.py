"""The KL between the chains of a policy and of its pretrained model, in nats.

    path KL = E sum_k KL_k,    KL_k = KL(policy(.|x_k) || reference(.|x_k)),    x from the policy

(the discrete Girsanov theorem; Fan et al., arXiv:2305.16381, lemma 4.1), at the parameters that sampled the chains.

Where all steps are stochastic, its sum bounds the KL between the final latents. A step without noise has no KL,
although the same weights make it: with a noise-free last step the sum bounds the KL between the latents before it, and
with a window of noisy steps only what happens inside the window, given the state in which it starts. `full_noise_kl`
looks at the other steps too: at the same states, with the means and std that they have under the sampler's full noise.
It can be compared between chains of different windows.

`path_kl` measures every stochastic step of every sample: what a weighed KL needs. One that is only logged is estimated
from few sites, at one row of the pretrained network each, the policy's half being known from sampling:

    sites = draw_sites(N, schedule, share=0.03, seed=...)              of an epoch, before it is sampled
    path = rollout(policy, ..., sites=sites.within(range(...)))        a batch: means are kept there
    kl = visit_kl(policy, path)                                        (P,) nats
    path_kl_estimate(kl, path.visits.sites.steps, schedule)            mean, standard error, mean of each step

B is the batch, N the number of samples, T of steps, S of stochastic steps, P of sites.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ddpo.sampling.gaussian import Gaussian
from ddpo.sampling.schedule import Schedule
from ddpo.seeds import random_orders, stream
from ddpo.trajectory import Condition, Sites, Trajectory

if TYPE_CHECKING:  # the policy loads diffusers
    from ddpo.policy import Policy


SHARE = 0.03  # of the rows of sampling


@torch.no_grad()
def path_kl(policy: "Policy", trajectory: Trajectory) -> Tensor:
    """KL(policy || reference) at the visited states of trajectories, (B, T) nats, 0 at deterministic steps.

    Args:
        policy: Guided or its conditional view, at the parameters that sampled; its sum over steps then estimates the
            path KL without bias.
        trajectory: With the states of all stochastic steps; the chain is its own.
    """
    return _visited_kl(policy.at(trajectory.schedule), trajectory)


@torch.no_grad()
def full_noise_kl(policy: "Policy", trajectory: Trajectory) -> Tensor:
    """The KL that all steps would have under the sampler's full noise at the visited states, (B, T) nats.

    Steps that have no noise even then are left out, as 0: `policy.full_noise.schedule.stochastic_steps` are the others.

    Args:
        policy: As for `path_kl`.
        trajectory: With all states, of any chain of the policy's sampler.
    """
    return _visited_kl(policy.full_noise, trajectory)


def steps_left_to_the_ode(policy: "Policy", schedule: Schedule) -> Schedule | None:
    """Full noise in just those steps that a chain leaves without, though the policy's sampler has some; None if none.

    Args:
        policy: Of the chain's sampler.
        schedule: The chain.
    """
    full = policy.full_noise.schedule
    hidden = full.stochastic & ~schedule.stochastic
    return replace(full, stochastic=hidden) if bool(hidden.any()) else None


def _visited_kl(policy: "Policy", trajectory: Trajectory) -> Tensor:
    """The KL to the reference of the policy's own noisy steps at a trajectory's states, (B, T) nats, 0 elsewhere."""
    states = {k: trajectory.state(k) for k in policy.schedule.stochastic_steps}
    steps = {k: policy(k, x, trajectory.condition) for k, x in states.items()}
    return kl_to_reference(policy, states, trajectory.condition, steps, like=trajectory.final).kl


class ReferenceSteps(NamedTuple):
    """What the pretrained model makes of steps.

    Attributes:
        kl: KL of the policy's steps to its own, (B, T) nats, 0 at other steps.
        means: Mean of its own by step, (B, *latent).
    """

    kl: Tensor
    means: dict[int, Tensor]


@torch.no_grad()
def kl_to_reference(
    policy: "Policy",
    states: Mapping[int, Tensor],
    condition: Condition,
    steps: Mapping[int, Gaussian],
    *,
    like: Tensor,
) -> ReferenceSteps:
    """KL of the given steps' distributions to the pretrained model's.

    Switching the adapter off walks over all layers: it is done once for all steps.

    Args:
        policy: On the chain of the steps.
        states: x_k by step.
        condition: B rows.
        steps: The policy's distribution of x_{k+1} by step.
        like: A tensor of B rows; the result has its precision and device.
    """
    kl, means = like.new_zeros(like.shape[0], policy.schedule.num_steps), {}
    with policy.reference():
        for k, step in steps.items():
            reference = policy(k, states[k], condition)
            kl[:, k], means[k] = step.kl(reference), reference.mean
    return ReferenceSteps(kl, means)


@dataclass(frozen=True, kw_only=True)
class PathKL:
    """An estimate of the mean path KL of samples, in nats.

    Attributes:
        mean: Unbiased.
        standard_error: Of the mean; None for one site. From 9 sites, Student's interval of `freedom` degrees covers the
            mean in 86% of epochs and +- 2 errors in 80%, from 76 sites 90% (`python scripts/path_kl_coverage.py`): a KL
            is skewed.
        freedom: Degrees of freedom of the error.
        per_step: Mean KL of each step, (T,): 0 at deterministic steps, NaN at stochastic ones without a site.
    """

    mean: float
    standard_error: float | None
    freedom: int
    per_step: Tensor


def _allotted(num_samples: int, *, num_steps: int, num_stochastic: int, share: float) -> tuple[int, int]:
    """How many sites the last stochastic step has, and all others together; a single one belongs to all."""
    budget = min(max(1, int(share * num_samples * num_steps)), num_samples * num_stochastic)
    if num_stochastic < 2:
        return budget, 0
    if budget == 1:
        return 0, 1
    last = min(num_samples, -(-budget // min(3, num_stochastic)))
    return last, min(budget - last, num_samples * (num_stochastic - 1))


def count_sites(num_samples: int, *, num_steps: int, num_stochastic: int, share: float = SHARE) -> int:
    """How many sites `draw_sites` draws."""
    return sum(_allotted(num_samples, num_steps=num_steps, num_stochastic=num_stochastic, share=share))


def draw_sites(num_samples: int, schedule: Schedule, *, share: float = SHARE, seed: int) -> Sites:
    """Random sites for an estimate of the path KL, stratified over steps and images.

    The last stochastic step, whose noise is the smallest and whose KL therefore the largest, has a third of the sites.
    The other steps have the same number each, those before it the ones that are left over; where there are fewer sites
    than steps, neighbouring steps share one, at a random one of them. A single site is at any step. The images, those
    of a prompt next to each other, are cut into as many pieces as a step has sites, and each site is at a random image
    of its piece; of steps with one site each has a piece of its own.

    Args:
        num_samples: N, of an epoch.
        schedule: Their chain.
        share: Number of sites over the N T rows of sampling, rounded down, but to one at least.
        seed: Of the choice.
    """
    steps = schedule.stochastic_steps
    last, others = _allotted(num_samples, num_steps=schedule.num_steps, num_stochastic=len(steps), share=share)
    random, strata = stream(seed), _strata(steps, last=last, others=others)
    begins = random_orders(1, len(strata), random)[0].tolist()
    rows, chosen = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for (stratum, size), begin in zip(strata, begins, strict=True):
        within = torch.from_numpy(random.random(size))
        within = (begin + within) / len(strata) if size == 1 else within
        rows.append(((torch.arange(size) + within) * (num_samples / size)).long().clamp(max=num_samples - 1))
        chosen.append(torch.tensor(stratum)[torch.from_numpy(random.integers(len(stratum), size=size))])
    return Sites(rows=torch.cat(rows), steps=torch.cat(chosen))


def _strata(steps: Sequence[int], *, last: int, others: int) -> list[tuple[tuple[int, ...], int]]:
    """Which stochastic steps have sites together, and how many: the last step alone, unless there is one site only."""
    if not steps or not last:
        return [(tuple(steps), others)] if steps else []
    count = min(others, len(steps) - 1)
    parts = torch.tensor(steps[:-1]).tensor_split(count) if count else ()
    each, extra = divmod(others, max(1, count))
    sizes = [each + (place >= count - extra) for place in range(count)]
    return [*zip((tuple(part.tolist()) for part in parts), sizes, strict=True), ((steps[-1],), last)]


@torch.no_grad()
def visit_kl(policy: "Policy", trajectory: Trajectory, *, batch_size: int | None = None, num_calls: int = 0) -> Tensor:
    """KL(policy || reference) at the visits of trajectories, (P,) nats on the policy's device.

    The policy's means are those of sampling, the pretrained model's come from batches that mix samples and steps: where
    the two are equal, the KL is 0 to the rounding of batched kernels.

    Args:
        policy: The one that was recorded, at the same parameters.
        trajectory: Sampled with `sites`.
        batch_size: Visits per call of the network; None for all.
        num_calls: Calls to make at least: a network that is split over processes is called by all as often.
    """
    visits, policy = trajectory.visits, policy.at(trajectory.schedule)
    assert visits is not None, "sampled with sites"
    count, condition = len(visits.mean), trajectory.condition
    found = [visits.mean.new_zeros(0)]
    pieces = torch.arange(count).split(batch_size or max(1, count)) if count else ()
    with policy.reference():
        for piece in pieces:
            k, rows = visits.sites.steps[piece], visits.sites.rows[piece]
            reference = policy(k, visits.latents[piece], condition.index(rows).to(policy.device))
            found.append(replace(reference, mean=visits.mean[piece]).kl(reference))
        for _ in range(num_calls - len(pieces)):
            policy(0, trajectory.final[:1].to(policy.device), condition.index(torch.tensor([0])).to(policy.device))
    return torch.cat(found)


@torch.no_grad()
def full_noise_visit_kl(
    policy: "Policy", trajectory: Trajectory, *, batch_size: int | None = None, num_calls: int = 0
) -> Tensor:
    """`full_noise_kl` at the visits of trajectories, (P,) nats; two rows of the network each.

    Args:
        policy: As for `visit_kl`, like `batch_size` and `num_calls`.
        trajectory: Sampled with sites at steps that have noise in `policy.full_noise`.
        batch_size: Visits per call.
        num_calls: Calls to make at least, of the policy and of the pretrained model.
    """
    visits, full = trajectory.visits, policy.full_noise
    assert visits is not None, "sampled with sites"
    pieces = torch.arange(len(visits.mean)).split(batch_size or max(1, len(visits.mean))) if len(visits.mean) else ()
    means = [visits.mean[:0]]
    for piece in pieces:
        k, condition = visits.sites.steps[piece], trajectory.condition.index(visits.sites.rows[piece])
        means.append(full(k, visits.latents[piece], condition.to(policy.device)).mean)
    for _ in range(num_calls - len(pieces)):
        condition = trajectory.condition.index(torch.tensor([0]))
        full(0, trajectory.final[:1].to(policy.device), condition.to(policy.device))
    moved = replace(trajectory, schedule=full.schedule, visits=replace(visits, mean=torch.cat(means)))
    return visit_kl(full, moved, batch_size=batch_size, num_calls=num_calls)


def path_kl_estimate(kl: Tensor, steps: Tensor, schedule: Schedule) -> PathKL:
    """The mean path KL from the KL at sites that `draw_sites` drew: sum over strata of their steps times the mean KL.

    A stratum h of n_h steps with m_h > 1 sites adds n_h^2 var_h / m_h to the squared error. Those with one site are
    taken in pairs of neighbours, or three: a group of g adds g times the variance of its n_h KL_h, which holds how the
    steps' means differ, too, and so is too large rather than too small. One that has no neighbour adds its square.

    Args:
        kl: Of all processes' sites, (P,) nats.
        steps: Their steps, (P,) int64.
        schedule: The chain.
    """
    stochastic, kl, steps = schedule.stochastic_steps, kl.double().cpu(), steps.cpu()
    per_step = torch.zeros(schedule.num_steps, dtype=torch.float64)
    for k in stochastic:
        per_step[k] = kl[steps == k].mean()
    last = int((steps == stochastic[-1]).sum()) if len(kl) > 1 else min(len(kl), len(stochastic) == 1)
    values = [
        len(stratum) * kl[torch.isin(steps, torch.tensor(stratum))]
        for stratum, _ in _strata(stochastic, last=last, others=len(kl) - last)
    ]
    alone = torch.cat([kl[:0], *(value for value in values if len(value) == 1)])
    groups = len(alone) // 2
    collapsed = (
        [len(part) * float(part.var()) for part in alone.tensor_split(groups)] if groups else [float(alone @ alone)]
    )
    square = math.fsum([float(value.var()) / len(value) for value in values if len(value) > 1] + collapsed)
    freedom = sum(len(value) - 1 for value in values) + len(alone) - groups
    return PathKL(
        mean=math.fsum(float(value.mean()) for value in values),
        standard_error=None if len(kl) == 1 else math.sqrt(square),
        freedom=freedom,
        per_step=per_step,
    )


def estimated_path_kl(policy: "Policy", trajectory: Trajectory, *, batch_size: int | None = None) -> PathKL:
    """The mean path KL of trajectories that one process sampled with `sites`; arguments as for `visit_kl`."""
    assert trajectory.visits is not None, "sampled with sites"
    kl = visit_kl(policy, trajectory, batch_size=batch_size)
    return path_kl_estimate(kl, trajectory.visits.sites.steps, trajectory.schedule)
