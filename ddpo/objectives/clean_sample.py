"""Learning from clean samples alone: no likelihood, so any sampler will do, the ODE included.

Of a sample only its clean latents z are kept. A unit is one noise: a step k of the sampler's grid and a fresh eps make
the state x_k = a_k z + s_k eps, and what the network returns there, in its own parametrisation (eps, x0, v or flow
velocity), is regressed: on what it should have returned, f*, or on frozen outputs moved towards it,

    loss = mean_units [ L(f_theta, f*, f_anchor, f_old, A) + lambda_ref |f_theta - f_ref|^2 / D
                                                           + lambda_old |f_theta - f_old|^2 / D ]

L is one of `ddpo.objectives.regression_losses`, A what the sample is worth, f_ref the pretrained network's output,
f_old the old policy's, an average of the weights, D the number of latent dimensions. The published methods are settings
of this (`ddpo.objectives.clean_sample_presets`). What the minimisers are, for samples of law p and a reward r / alpha:

    sample, exponential    the denoiser of p(z) exp(r(z) / alpha) / Z; a second round tilts that again
    shifted, old           f_old + Cov(f*, A | x): a step along df / d(1 / alpha) = Cov(f*, r | x). Many small ones,
                           each on new samples, make the same tilted law (Tilt Matching)
    shifted, reference     where f = old, f = f_ref + Cov(f*, r | x) / alpha, the covariance that of the policy's own
                           law: for Gaussian data and a linear reward the KL optimum, in general not (RAM is biased)

Deviations: times are those of the sampler's own grid, stratified over a sample's noises; and guidance is left out of
the losses but for `rwr` and `raft`, whose rewards keep their own scale.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ddpo.objectives.base import Demand, Loss, Models
from ddpo.objectives.clean_sample_presets import (
    NAMES,
    PRESETS,
    Anchor,
    Compare,
    ErrorOf,
    Guidance,
    Knobs,
    Preset,
    Sampling,
    Worth,
)
from ddpo.objectives.experience import Experience
from ddpo.objectives.group_regression import GroupRegression
from ddpo.objectives.noised_samples import NoisedSamples, drawn, mean_square, predictions
from ddpo.objectives.noising import Times, noise_share
from ddpo.objectives.regression_losses import LOSSES, RHO, Compared, Normalisation, Target
from ddpo.placement import fetch
from ddpo.trajectory import Keep
from ddpo.validation import check


@dataclass(frozen=True, kw_only=True)
class CleanSampleConfig:
    """Regression on noised clean samples.

    A key that is null takes the preset's value (docs/algorithms.md has the table).

    Attributes:
        preset: The method: `rwr` (reward-weighted regression), `raft` (the best of each prompt), `ram`,
            `tilt_matching`, `nft` (DiffusionNFT as in its paper; `nft_published` as in its code), `awm`, `dgpo`.
        worth: What a sample counts: an `exponential` of its reward, normalised to mean 1; or its `advantage`, as of
            the group `advantages`, in deviations of the reward with a scale there.
        temperature: Reward units per factor e of an exponential weight.
        compare: Among which samples exponential weights are normalised: those of the `epoch`, or of the same `prompt`.
        best_fraction: Take this share of them, the best, at least one, with equal weights, instead of the exponential.
        clip: Advantages are clipped to [-clip, clip]; .inf for never.
        multiplier: m, by which advantages are multiplied: a round tilts at the temperature 1 / m, in deviations. With
            `target: group` it is beta.
        target: What the output is regressed on: the `sample`, weighted by its worth; the anchor's output `shifted`
            towards the sample by worth and multiplier; this in `contrast` to what is as far on the other side; or all
            samples of a `group`, in one logistic loss.
        anchor: Whose output is shifted: the pretrained `reference` or the `old` policy.
        error_of: Whether errors are those of the network's `output`, or of the `clean` latents that it stands for.
        normalisation: `none` takes the mean square; `relative` divides it by the error's own mean absolute value;
            `huber` takes its fourth root, times the share of noise.
        times: Which steps of the grid are drawn: all alike (`grid`), or with density 2 t in the share of noise
            (`noisy`).
        skip_steps: First steps of the grid that are not trained.
        stratified: Whether a sample's noises share out the steps among them.
        noises: Noises an image and pass, each at its own denoising step: the units of work.
        reference_weight: Weight of the mean squared distance to the pretrained network's output.
        old_weight: Weight of the mean squared distance to the old policy's output.
        old_rate: The old policy keeps a share of itself after an epoch that rises by this number every epoch...
        old_limit: ... up to this share; 0 makes it the policy at the start of the epoch.
        sample_from: Whether epochs are sampled from the `policy` or the `old` one.
        train_guidance: `same` regresses the guided prediction that was sampled from. `none` regresses the conditional
            branch alone, as in pretraining, at half the cost.
        updates_per_epoch: Optimizer steps per inner epoch; each takes its own share of every image's noises.
        inner_epochs: Passes over an epoch's images, with fresh noises.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["clean_sample"] = "clean_sample"
    preset: Preset = "rwr"
    worth: Worth | None = None
    temperature: float | None = None
    compare: Compare | None = None
    best_fraction: float | None = None
    clip: float | None = None
    multiplier: float | None = None
    target: Target | None = None
    anchor: Anchor | None = None
    error_of: ErrorOf | None = None
    normalisation: Normalisation | None = None
    times: Times | None = None
    skip_steps: int | None = None
    stratified: bool | None = None
    noises: int | None = None
    reference_weight: float | None = None
    old_weight: float | None = None
    old_rate: float | None = None
    old_limit: float | None = None
    sample_from: Sampling | None = None
    train_guidance: Guidance | None = None
    updates_per_epoch: int = 1
    inner_epochs: int = 1

    def __post_init__(self) -> None:
        knobs = self.knobs
        check(0 < knobs.temperature < math.inf, "temperature", knobs.temperature, "positive and finite")
        best = knobs.best_fraction
        check(best is None or 0 <= best <= 1, "best_fraction", best, "in [0, 1] or null")
        for name in ("clip", "multiplier"):
            value = getattr(knobs, name)
            check(value > 0 and (name == "clip" or value < math.inf), name, value, "positive")
        for name in ("reference_weight", "old_weight", "skip_steps", "old_rate"):
            check(0 <= getattr(knobs, name) < math.inf, name, getattr(knobs, name), "at least 0")
        check(0 <= knobs.old_limit < 1, "old_limit", knobs.old_limit, "in [0, 1)")
        check(knobs.noises >= 1, "noises", knobs.noises, "at least 1")
        for name in ("updates_per_epoch", "inner_epochs"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        self._check_together(knobs)

    def _check_together(self, knobs: Knobs) -> None:
        """Settings that contradict each other, and given ones that nothing would read."""
        advantage, group = knobs.worth == "advantage", knobs.target == "group"
        cure = f"sample with worth: {knobs.worth} (only an advantage says to which side to shift)"
        check(advantage or knobs.target == "sample", "target", knobs.target, cure)
        plain = knobs.normalisation == "none" and knobs.error_of == "output" and knobs.old_weight == 0
        cure = "none, as must error_of be output and old_weight 0, with target: group (its weights are of plain errors)"
        check(plain or not group, "normalisation", knobs.normalisation, cure)
        cure = "finite with target: contrast, which weighs both sides by how far an advantage is from its bound"
        check(knobs.target != "contrast" or knobs.clip < math.inf, "clip", knobs.clip, cure)
        self._refuse(("temperature", "compare", "best_fraction"), advantage, "worth: advantage")
        self._refuse(("temperature",), knobs.best_fraction is not None, "a best_fraction, whose images weigh the same")
        self._refuse(("clip", "multiplier"), not advantage, "worth: exponential")
        alone = knobs.target in ("sample", "group")
        self._refuse(("anchor",), alone, f"target: {knobs.target}, which has no anchor")
        without = "neither a target with an anchor, nor an old_weight, nor sample_from: old"
        self._refuse(("old_rate", "old_limit"), not knobs.keeps_old, without)

    def _refuse(self, names: tuple[str, ...], unread: bool, chosen: str) -> None:
        for name in names:
            value = getattr(self, name)
            check(value is None or not unread, name, value, f"null with {chosen}: nothing would read it")

    @cached_property
    def knobs(self) -> Knobs:
        """The preset's settings, with those that are given in their places."""
        given = {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}
        return replace(PRESETS[self.preset], **given)

    def build(self) -> "CleanSampleRegression | GroupRegression":
        """The objective with these keys."""
        knobs = self.knobs
        demand = Demand(
            name=self.preset,
            unit="noise",
            units=lambda num_stochastic: knobs.noises,
            updates=self.updates_per_epoch,
            passes=self.inner_epochs,
            guidance=knobs.train_guidance == "same",
            keep=Keep.FINAL,
            old_policy=knobs.old_decay if knobs.keeps_old else None,
            samples_from_old=knobs.sample_from == "old",
            frozen_passes=knobs.uses_old + knobs.uses_reference,
            least_steps=knobs.skip_steps + 1,
        )
        if knobs.target == "group":
            demand = replace(demand, unit="group noise", whole_groups=True, group_rows=True)
            return GroupRegression(demand=demand, knobs=knobs)
        return CleanSampleRegression(demand=demand, knobs=knobs)


@dataclass(frozen=True, kw_only=True)
class CleanSampleRegression:
    """Regression on clean samples: a unit is a noise.

    Attributes:
        demand: The clean latents.
        knobs: All settings.
    """

    demand: Demand
    knobs: Knobs

    def gather(self, experience: Experience, rows: Tensor, slots: Tensor, *, seed: int) -> NoisedSamples:
        """Noise number `slots` of samples `rows`: a function of the pass, the sample's own seed and the slot."""
        path, device, knobs = experience.trajectory, experience.trajectory.log_probs.device, self.knobs
        clean = fetch(path.final[rows], device)
        steps, eps = drawn(knobs, path, rows, slots, seed=seed)
        return NoisedSamples(
            steps=steps,
            clean=clean,
            eps=eps.to(device),
            weights=self._worth(experience, rows).to(clean),
            condition=path.condition.index(rows).to(device),
        )

    def losses(self, models: Models, batch: NoisedSamples) -> Iterator[Loss]:
        """The regression's error, and the distances to frozen networks where they have a weight."""
        knobs, steps = self.knobs, batch.steps
        policy = models.policy.at(replace(models.policy.schedule, clip=None))  # a clamped prediction has no gradient
        seen = predictions(knobs, policy, models, batch)
        outputs = {name: policy.network_output(steps, prediction) for name, prediction in seen.items()}
        compared = {name: x.x0 for name, x in seen.items()} if knobs.error_of == "clean" else outputs
        loss = LOSSES[knobs.target](
            Compared(
                output=compared["own"],
                data=compared["data"],
                anchor=compared.get(knobs.anchor),
                old=compared.get("old"),
                worth=batch.weights,
                noise=noise_share(policy.schedule)[steps].to(batch.weights),
            ),
            rho=RHO[knobs.normalisation],
            multiplier=knobs.multiplier,
            bound=knobs.clip,
        )
        metrics = {"regression_error": mean_square(outputs["own"] - outputs["data"])}
        for name, weight in (("reference", knobs.reference_weight), ("old", knobs.old_weight)):
            if name in outputs:
                metrics[f"distance_to_{name}"] = distance = mean_square(outputs["own"] - outputs[name])
                loss = loss + weight * distance
        if knobs.worth == "exponential":
            metrics["weight_squared"] = batch.weights.square()
        elif knobs.clip < math.inf:
            metrics["advantage_clipped"] = (batch.weights.abs() >= knobs.clip).to(batch.weights)
        yield Loss(value=loss.mean(), metrics={name: value.detach() for name, value in metrics.items()}, steps=steps)

    def _worth(self, experience: Experience, rows: Tensor) -> Tensor:
        """What samples count, (N,): weights with mean 1 over those compared, or clipped advantages."""
        knobs = self.knobs
        if knobs.worth == "advantage":  # all steps are worth the same
            return experience.advantages[rows, 0].clamp(-knobs.clip, knobs.clip)
        groups = experience.groups if knobs.compare == "prompt" else torch.zeros_like(experience.groups)
        weights = sample_weights(experience.scores, groups, knobs.temperature, best_fraction=knobs.best_fraction)
        return weights[experience.start + rows]


def sample_weights(scores: Tensor, groups: Tensor, temperature: float, *, best_fraction: float | None = None) -> Tensor:
    """What samples count, (N,) float64, with mean 1 in every group.

    Args:
        scores: What is maximised, (N,).
        groups: Ids of those that are compared, (N,) int64.
        temperature: Reward units per factor e of a weight.
        best_fraction: Take this share of each group, at least one sample, with equal weights; None for the exponential.
    """
    weights = torch.zeros(len(scores), dtype=torch.float64, device=scores.device)
    for group in torch.unique(groups):
        members = torch.nonzero(groups == group).flatten()
        values = scores[members].double()
        if best_fraction is None:
            weights[members] = torch.softmax(values / temperature, dim=0) * len(members)
        else:
            count = max(1, round(best_fraction * len(members)))
            weights[members[values.topk(count).indices]] = len(members) / count
    return weights
