"""Adjoint matching: the control that a differentiable reward asks for, by regression (arXiv:2409.08861).

With u_k = (mean_k - mean_ref_k) / std_k, the control, our J = E[r(x_T)] - alpha E sum_k |u_k|^2 / 2 has the optimum

    u_k* = -std_k E[ a_{k+1} | x_k ],    a_T = -grad r / alpha,    a_k = J_ref_k(x_k)^T a_{k+1}

along its own chains. For by the envelope theorem the gradient of a state's value is that with all later controls held,
as those that change with the state change it by nothing at the optimum: grad V_k(x) = E[J_ref_k(x)^T grad V_{k+1} | x],
so that grad V_k = -alpha E[a_k | x_k]. The loss, over chains of the present policy,

    mean_k |u_k + std_k a_{k+1}|^2 / (2 D)    =    mean_k |mean_k - target_k|^2 / (2 std_k^2 D)

has the optimum of J for its fixed point, whatever the noise of the sampler. No gradient goes through a chain, and none
through the reward but a_T: memory is that of a step.

The paper derives it for the limit of many steps, where u_k may be paired with a_k as well, and its code does so
(`pairing: published`): at ten steps that ends 3e-2 of the whole gain short of the optimum of the chain (`ddpo verify`).
It needs noise that is memoryless for the optimum to be the tilted law p_ref exp(r / alpha) / Z: `ddim` at eta 1, or
`flow_sde` at eta sqrt 2, and enough steps. A run whose chain remembers its first state says so.

Deviations: the paper's lambda is 1 / alpha. Its runs sample with guidance and train without (`train_guidance: none`,
where the fixed point is no optimum of what samples); weights make up for drawing early steps more often; half of the
steps come from the first 60%, each half from strata. A replay trains on targets of other controls than the present
one, which is a bias that goes away as they stop changing.

Legend: `N` terms of a micro-batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ddpo.objectives.adjoint_targets import AdjointRules, AdjointTargets, Targets
from ddpo.objectives.base import Demand, Loss, Models, Prepare
from ddpo.objectives.experience import Experience
from ddpo.placement import fetch
from ddpo.sampling.schedule import coefficient
from ddpo.trajectory import Condition, Keep
from ddpo.validation import check


@dataclass(frozen=True, kw_only=True)
class AdjointMatchingConfig:
    """Regression on the reward's gradient, carried back through the pretrained chain.

    Attributes:
        pairing: `next` matches the control of a step with the adjoint of the state after it, which is exact for any
            number of steps; `published` with that of the state before it, as the authors' code does.
        steps_per_sample: Noisy steps of a sample that are trained, drawn anew every epoch (published: 4); null for all.
        early_fraction: Half of them are drawn from this first share of the noisy steps (published: 0.6), and weighed so
            that the loss stays a mean over all steps.
        loss_quantile: Leave out samples whose loss is above a moving average of this quantile (published: 0.9): a bias
            against steep rewards, for stability; null for none.
        replay_epochs: Train again on the targets of so many epochs before, as many terms of each; the weight of the KL,
            which they hold, must then be fixed.
        train_guidance: `same` controls the guided policy that was sampled from. `none` the conditional branch alone, at
            half the cost; the samples then come from another policy.
        updates_per_epoch: Optimizer steps per inner epoch; each takes its own share of every sample's terms.
        inner_epochs: Passes over an epoch's terms.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["adjoint_matching"] = "adjoint_matching"
    pairing: Literal["next", "published"] = "next"
    steps_per_sample: int | None = None
    early_fraction: float = 0.5
    loss_quantile: float | None = None
    replay_epochs: int = 0
    train_guidance: Literal["same", "none"] = "same"
    updates_per_epoch: int = 1
    inner_epochs: int = 1

    def __post_init__(self) -> None:
        steps, quantile = self.steps_per_sample, self.loss_quantile
        check(steps is None or (steps >= 2 and steps % 2 == 0), "steps_per_sample", steps, "even, or null for all")
        check(0 < self.early_fraction < 1, "early_fraction", self.early_fraction, "between 0 and 1")
        alone = steps is not None or self.early_fraction == 0.5
        check(alone, "early_fraction", self.early_fraction, "0.5 without steps_per_sample (every step is trained)")
        check(quantile is None or 0 < quantile < 1, "loss_quantile", quantile, "between 0 and 1, or null")
        check(self.replay_epochs >= 0, "replay_epochs", self.replay_epochs, "at least 0")
        for name in ("updates_per_epoch", "inner_epochs"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")

    def build(self) -> "AdjointMatching":
        """The objective with these keys."""
        rules = AdjointRules(
            num_trained=self.steps_per_sample,
            early_fraction=self.early_fraction,
            published_pairing=self.pairing == "published",
            loss_quantile=self.loss_quantile,
            kept_epochs=self.replay_epochs,
        )

        def terms(num_stochastic: int) -> int:
            return num_stochastic if self.steps_per_sample is None else self.steps_per_sample

        return AdjointMatching(
            demand=Demand(
                name="adjoint matching",
                unit="step",
                units=lambda num_stochastic: terms(num_stochastic) * (1 + self.replay_epochs),
                updates=self.updates_per_epoch,
                passes=self.inner_epochs,
                guidance=self.train_guidance == "same",
                weighs_kl=True,
                needs_kl=True,
                kept_targets=self.replay_epochs > 0,
                reward_gradient=True,
                keep=Keep.ALL,
                means=self.loss_quantile is not None,
                prepare=Prepare(
                    name="adjoints", rows=lambda num_steps: num_steps, make=lambda: AdjointTargets(rules),
                    kept_states=lambda num_stochastic: 2 * terms(num_stochastic) * (1 + self.replay_epochs),
                    decodes=1,
                ),
            ),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Matched:
    """A micro-batch of N terms.

    Attributes:
        steps: Denoising step indices, (N,) int64.
        states: x_k, (N, *latent).
        targets: Of the step's mean, (N, *latent).
        weights: Of the terms, (N,).
        pull: KL of the target to the pretrained step, (N,) nats.
        condition: N rows.
    """

    steps: Tensor
    states: Tensor
    targets: Tensor
    weights: Tensor
    pull: Tensor
    condition: Condition


@dataclass(frozen=True, kw_only=True)
class AdjointMatching:
    """Adjoint matching: a unit is a trained step of a sample of this epoch, or of a remembered one.

    Attributes:
        demand: Differentiable rewards, all states, a weighted KL, and targets made before the first update.
    """

    demand: Demand

    def gather(self, experience: Experience, rows: Tensor, slots: Tensor, *, seed: int) -> Matched:
        """The terms number `slots` of samples `rows`: K of this epoch's, then K of each that is remembered.

        While fewer epochs are remembered than are wanted, those that are take their turns.
        """
        kept = _targets(experience)
        device, count = experience.trajectory.log_probs.device, kept[0].steps.shape[1]
        ages = torch.div(slots, count, rounding_mode="floor") % len(kept)
        parts, places = [], []
        for age, targets in enumerate(kept):
            of_age = torch.nonzero(ages == age).flatten()
            if len(of_age):
                parts.append(_terms(targets, rows[of_age], slots[of_age] % count, device))
                places.append(of_age)
        back = torch.cat(places).argsort()
        own = back.to(device)
        return Matched(
            steps=torch.cat([part.steps for part in parts])[own],
            states=torch.cat([part.states for part in parts])[own],
            targets=torch.cat([part.targets for part in parts])[own],
            weights=torch.cat([part.weights for part in parts])[own],
            pull=torch.cat([part.pull for part in parts])[own],
            condition=Condition.concatenate([part.condition for part in parts]).index(back),
        )

    def losses(self, models: Models, batch: Matched) -> Iterator[Loss]:
        """The squared distance of the means to their targets, in nats per latent dimension."""
        mean = models.policy(batch.steps, batch.states, batch.condition).mean
        std = coefficient(models.policy.schedule.std, batch.steps, mean)
        nats = 0.5 * ((mean - batch.targets) / std).flatten(1).square().sum(1)
        dims = batch.states[0].numel()
        metrics = {
            "matching_nats": nats.detach(),
            "target_kl_nats": batch.pull,
            "clip_fraction": (batch.weights == 0).float(),
        }
        yield Loss(value=(batch.weights * nats).mean() / dims, metrics=metrics, steps=batch.steps)


def _targets(experience: Experience) -> tuple[Targets, ...]:
    """What was made before the first update."""
    assert isinstance(experience.prepared, tuple) and experience.prepared, "targets are made before the first update"
    return experience.prepared


def _terms(targets: Targets, rows: Tensor, slots: Tensor, device: torch.device) -> Matched:
    """Some terms of an epoch, on a device."""
    there = rows.to(targets.states.device), slots.to(targets.states.device)
    here = rows.to(targets.pull.device), slots.to(targets.pull.device)
    return Matched(
        steps=targets.steps[rows, slots].to(device),
        states=fetch(targets.states[there], device),
        targets=fetch(targets.means[there], device),
        weights=targets.weights[here].to(device),
        pull=targets.pull[here].to(device),
        condition=targets.condition.index(rows).to(device),
    )
