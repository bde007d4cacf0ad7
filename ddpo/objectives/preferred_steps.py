"""Preferences on the densities of sampled steps (D3PO, SPO): the steps' part of `ddpo.objectives.preference`.

A unit is a step of a pair of samples, which share out its steps, so that each is trained once; or a step of one sample
from whose state several next ones were drawn.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpo.credit.advantage_scale import ROUNDING
from ddpo.objectives.base import Demand, Loss, Models
from ddpo.objectives.experience import Experience
from ddpo.objectives.pairs import compared, opposite_ranks, preference_loss
from ddpo.placement import fetch
from ddpo.sampling.gaussian import Gaussian
from ddpo.sampling.schedule import coefficient
from ddpo.trajectory import Condition, Keep


@dataclass(frozen=True, kw_only=True)
class PairedSteps:
    """A micro-batch of N steps of pairs: N rows of the better sample, then N of the worse.

    Attributes:
        steps: Denoising step indices, (N,) int64.
        latents: x_k, (2N, *latent).
        next_latents: x_{k+1}, (2N, *latent).
        log_probs: Of sampling, (2N,) nats.
        weight: Of the pairs, (N,), with mean 1 over an epoch; 0 where one is skipped.
        condition: 2N rows.
    """

    steps: Tensor
    latents: Tensor
    next_latents: Tensor
    log_probs: Tensor
    weight: Tensor
    condition: Condition


def steps_of_pairs(demand: Demand) -> Demand:
    """What is demanded of sampling besides: whole chains of whole groups, from the same initial noise."""
    return replace(
        demand,
        unit="pair step",
        units=lambda num_stochastic: math.ceil(num_stochastic / 2),
        rows=2,
        whole_groups=True,
        decisions=True,
        same_start=True,
        keep=Keep.ALL,
    )


@dataclass(frozen=True, kw_only=True)
class PreferredSteps:
    """The logistic loss of two steps' log-ratios to the pretrained model.

    Attributes:
        demand: All states of whole groups.
        beta: Log-odds per unit of the mean log-ratio over the dimensions.
        clip: Half-width around 1 to which ratios are clamped, or None.
        margin: Pairs whose scores differ by less are skipped.
    """

    demand: Demand
    beta: float
    clip: float | None
    margin: float

    def gather(self, experience: Experience, rows: Tensor, slots: Tensor, *, seed: int) -> PairedSteps:
        """Steps number `slots` of the pairs of which samples `rows` are the better; of the others counted from the end.

        Of an odd number of steps both have the one in the middle, where it counts half.
        """
        path, decisions = experience.trajectory, experience.decisions
        pairs = opposite_ranks(experience.scores, experience.groups, margin=self.margin)
        places = experience.start + rows
        better, worse, last = pairs.better[places], pairs.worse[places], len(decisions) - 1
        steps = decisions[torch.where(better == places, slots, last - slots)]
        share = torch.where(2 * slots == last, 0.5, 1.0) * (last // 2 + 1) * 2 / (last + 1)
        both, at = torch.cat([better, worse]) - experience.start, steps.repeat(2)
        device = path.log_probs.device
        return PairedSteps(
            steps=steps,
            latents=fetch(path.latents[both, at], device),
            next_latents=fetch(path.latents[both, at + 1], device),
            log_probs=path.log_probs[both.to(device), at.to(device)],
            weight=(pairs.weight[places] * share).to(device, torch.float32),
            condition=path.condition.index(both).to(device),
        )

    def losses(self, models: Models, batch: PairedSteps) -> Iterator[Loss]:
        """The logistic loss of the difference of two log-ratios."""
        yield step_loss(models, batch, beta=self.beta, clip=self.clip)


def contended_steps(demand: Demand, *, first: int, contenders: int) -> Demand:
    """What is demanded of sampling besides: whole chains with means, and several next states from step `first` on."""

    def contended(num_stochastic: int) -> int:
        return max(0, num_stochastic - first)

    return replace(
        demand,
        unit="contested step",
        units=lambda num_stochastic: max(1, contended(num_stochastic)),
        rows=2,
        decisions=True,
        keep=Keep.ALL,
        means=True,
        contended=contended,
        contenders=contenders,
    )


@dataclass(frozen=True, kw_only=True)
class ContendedSteps:
    """The same loss for the best and the worst of several next states from one state: a unit is a contended step.

    Attributes:
        demand: All states, means and contenders.
        beta: As of `PreferredSteps`.
        clip: As of `PreferredSteps`.
        margin: Contests whose scores differ by less are skipped.
    """

    demand: Demand
    beta: float
    clip: float | None
    margin: float

    def gather(self, experience: Experience, rows: Tensor, slots: Tensor, *, seed: int) -> PairedSteps:
        """Contended steps number `slots` of samples `rows`; nothing is drawn."""
        path, device = experience.trajectory, experience.trajectory.log_probs.device
        assert experience.contests is not None and path.contenders is not None and path.means is not None
        scores = experience.contests.cpu().double()
        gap = scores.amax(2) - scores.amin(2)
        counts = ((gap >= self.margin) & (gap > ROUNDING * scores.abs().max())).double()
        weight = counts / counts.mean().clamp(min=1 / counts.numel())
        places = experience.start + rows
        number = len(experience.decisions) - path.contenders.shape[1] + slots
        steps = experience.decisions[number]
        chosen = torch.cat([scores.argmax(2)[places, slots], scores.argmin(2)[places, slots]])
        after = fetch(path.contenders[rows.repeat(2), slots.repeat(2), chosen], device)
        mean = fetch(path.means[rows.repeat(2), number.repeat(2)], device)
        sampled = Gaussian(mean=mean, std=coefficient(path.schedule.std, steps.repeat(2).to(device), mean))
        return PairedSteps(
            steps=steps,
            latents=fetch(path.latents[rows, steps], device).repeat(2, *[1] * (mean.ndim - 1)),
            next_latents=after,
            log_probs=sampled.log_prob(after),
            weight=weight[places, slots].to(device, torch.float32),
            condition=path.condition.index(rows.repeat(2)).to(device),
        )

    def losses(self, models: Models, batch: PairedSteps) -> Iterator[Loss]:
        """The logistic loss of the difference of two log-ratios."""
        yield step_loss(models, batch, beta=self.beta, clip=self.clip)


def step_loss(models: Models, batch: PairedSteps, *, beta: float, clip: float | None) -> Loss:
    """The logistic loss of the difference of two log-ratios to the pretrained model, means over the dimensions.

    Args:
        models: With the policy.
        batch: N pairs.
        beta: Log-odds per unit of it.
        clip: Half-width around 1 to which ratios are clamped, or None.
    """
    policy, steps = models.policy, batch.steps.repeat(2)
    with policy.reference():
        reference = policy(steps, batch.latents, batch.condition).log_prob(batch.next_latents)
    log_probs = policy(steps, batch.latents, batch.condition).log_prob(batch.next_latents)
    ratio = (log_probs - reference) / batch.latents[0].numel()
    if clip is not None:
        ratio = ratio.clamp(math.log1p(-clip), math.log1p(clip))
    better, worse = ratio.chunk(2)
    logits = beta * (better - worse)
    drift = (log_probs - batch.log_probs).detach().abs()
    metrics = {
        **compared(logits, batch.weight),
        "better_log_ratio": batch.weight * better.detach(),
        "worse_log_ratio": batch.weight * worse.detach(),
    }
    loss = (batch.weight * preference_loss(logits)).mean()
    return Loss(value=loss, metrics=metrics, steps=batch.steps, drift=torch.maximum(*drift.chunk(2)))
