"""What a likelihood-ratio objective does not see, added: the derivative through the steps without noise.

One network makes all steps, so the objective J = E[r(x_T) - alpha sum_j KL_j] moves with the weights w through steps
without a density too. With the weights of each step told apart,

    grad J = sum over k with noise    E[ A_k d/dw_k log pi_k ] - alpha E[ d/dw_k KL_k ]           the objective's own
           + sum over k without       E[ d/dw_k ( r(x_T) - alpha sum_{j > k} KL_j ) ]             a chain's

where in the second line the chain is taken again from the state before the first such step, by the sample's own noise:
the weights of steps without noise have a graph, those of the others are constants through which the state is
differentiated. Steps that the pretrained weights make are passed through. Both lines are divided by what advantages are
divided by.

A sample's units are those of the objective, S steps with noise, and one more, its chain. The loss is a mean over units,
and the objective's own is one over S: all are multiplied by (S + 1) / S. In later updates of an epoch a chain follows
the present weights from a state that the sampling policy reached, unweighted, as the KL is.

Legend: `N` units of a micro-batch, `C` of them chains; `D` latent dimensions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddpo.objectives.base import Demand, Loss, Models, Objective
from ddpo.objectives.experience import Experience
from ddpo.objectives.pathwise import StepKind, Stretch, differentiate
from ddpo.sampling.schedule import Schedule
from ddpo.trajectory import Samples


def with_chain(demand: Demand) -> Demand:
    """What the objective demands when each sample has a chain as one more unit."""

    def units(num_stochastic: int) -> int:
        return demand.units(num_stochastic) + 1

    return replace(
        demand,
        unit="term",
        units=units,
        reference_means=False,
        spares=False,
        reward_gradient=True,
        decodes=1,
        recomputed=True,
        varies=True,
        chain_unit=True,
    )


@dataclass(frozen=True, kw_only=True)
class StepsAndChains:
    """A micro-batch of N units.

    Attributes:
        steps: Those of the objective, as it gathers them; None for none.
        num_steps: How many they are.
        chains: C samples.
        scale: What their advantages were divided by, (C,) reward units.
        alpha: Reward units per nat.
    """

    steps: object | None
    num_steps: int
    chains: Samples
    scale: Tensor
    alpha: float


@dataclass(frozen=True, kw_only=True)
class WithUnseenSteps:
    """An objective on steps with noise, and the derivative of the reward through the others.

    Attributes:
        demand: As of `with_chain`.
        seen: The objective; its loss is a mean over steps with noise, divided by D.
    """

    demand: Demand
    seen: Objective[Any]

    def gather(self, experience: Experience, rows: Tensor, slots: Tensor, *, seed: int) -> StepsAndChains:
        """The objective's units of samples `rows`, and the chains of those whose slot is the last."""
        is_chain = slots == len(experience.decisions)
        own, steps = rows[is_chain], ~is_chain
        assert experience.scale is not None, "scores were compared"
        return StepsAndChains(
            steps=self.seen.gather(experience, rows[steps], slots[steps], seed=seed) if bool(steps.any()) else None,
            num_steps=int(steps.sum()),
            chains=experience.samples.index(own),
            scale=experience.scale[own.to(experience.scale.device)],
            alpha=experience.alpha,
        )

    def losses(self, models: Models, batch: StepsAndChains) -> Iterator[Loss]:
        """The objective's, and one of the chains."""
        schedule, count = models.policy.schedule, batch.num_steps + len(batch.chains)
        decisions = len(schedule.stochastic_steps)
        each = (decisions + 1) / (decisions * count)
        if batch.steps is not None:
            for loss in self.seen.losses(models, batch.steps):
                yield replace(loss, value=each * batch.num_steps * loss.value)
        if len(batch.chains):
            worth, drift = _chain_worth(models, batch.chains, alpha=batch.alpha)
            dims = batch.chains.trajectory.final[0].numel()
            value = -each * (worth / batch.scale.to(worth)).sum() / dims
            yield Loss(value=value, metrics={}, steps=torch.full((len(drift),), schedule.unseen_steps[0]), drift=drift)


def _chain_worth(models: Models, samples: Samples, *, alpha: float) -> tuple[Tensor, Tensor]:
    """r(x_T) - alpha sum_j KL_j with its graph through the unseen steps, (C,) reward units; and the drift, (C,)."""
    assert models.score is not None, "rewards are differentiated"
    schedule = models.policy.schedule
    first = schedule.unseen_steps[0]
    stretch = Stretch(
        first=torch.full((len(samples),), first),
        pattern=tuple(_kind(schedule, k) for k in range(first, schedule.num_steps)),
        jacobian=True,
        predicted=False,
    )
    weighs_kl = alpha > 0 and "held" in stretch.pattern
    reached = differentiate(models.policy, samples.trajectory, stretch, weighs_kl=weighs_kl, recomputed=True)
    images = models.policy.decode(reached.latents, with_gradient=True)
    rewards = models.score(images, samples.prompts, samples.metadata)
    return rewards - alpha * reached.kl, reached.drift


def _kind(schedule: Schedule, k: int) -> StepKind:
    """What step k of a chain is: only unseen steps are differentiated by their weights."""
    if k in schedule.pretrained_steps:
        return "pretrained"
    return "trained" if k in schedule.unseen_steps else "held"
