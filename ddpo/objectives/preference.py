"""Learning from what is preferred: of two images of a prompt the better, or of one whether it is liked.

    dpo     -log sigmoid( -(beta / 2) [ d_w - d_l ] ),    d = e - e_ref                      (arXiv:2311.12908)
    kto     1 - sigmoid( s beta (-d - K) ),    K = max(mean of -d over the update, 0)        (arXiv:2404.04465)
    d3po    -log sigmoid( beta [ l_w - l_l ] ),    l = log pi/pi_ref of a step               (arXiv:2311.13231)
    spo     the same for two of several next states from one state                          (arXiv:2406.04314)

w is the better of a pair and l the worse, s = 1 for a liked image and -1 for one that is not. Of dpo and kto only the
clean latents z are kept: e = |f_theta(x_k, k) - f*|^2 / D is the error of the network's output at x_k = a_k z + s_k eps
against what stands for (z, eps), in its own parametrisation (eps, v, flow velocity), with the same k and eps for both
of a pair; e_ref is the pretrained network's. d3po compares the densities of the steps that sampling took, two chains
from the same initial noise; l is a mean over the D dimensions, so that beta is beta / D of the density's nats. spo
draws M next states from the same state at each step from a first one on, scores the clean images that the policy
predicts from them by the run's own rewards (the paper trains a reward for noisy images), and goes on from a random one.

Pairs are the best of a prompt's samples against the worst in one epoch, or come from a file. Pairs of equal scores are
skipped.

What they find. With the true log-densities in the place of -(beta / 2) d and labels that follow the rewards (Bradley
and Terry), the minimiser of the logistic loss is the law p_ref exp(r) / Z. Errors at one random (k, eps) are no
densities: the logistic loss is convex in the logit, so that the noise of k and eps bends it (Jensen), the more the
larger the change from the pretrained model. `draws` averages the error over several noises inside the sigmoid and
takes that part away; what is left is that an expected error is no log-density (`ddpo verify --only preference`). The
best of a group is always preferred to the worst, so that beta alone, which weighs the pretrained model as a KL would,
bounds how far the policy moves.

Deviations: times are those of the sampler's own grid, stratified over a sample's noises; every sample of a group draws
its own noises for the group's pair; K is a mean over the whole update, where the paper's code takes a device batch.
Images of a file are encoded to the mean of the VAE's posterior.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ddpo.objectives.base import Demand, Loss, Models
from ddpo.objectives.experience import Experience
from ddpo.objectives.noising import draw_noises, step_shares
from ddpo.objectives.pairs import best_and_worst, compared, preference_loss
from ddpo.objectives.preferred_steps import ContendedSteps, PreferredSteps, contended_steps, steps_of_pairs
from ddpo.placement import fetch
from ddpo.sampling.prediction import Prediction
from ddpo.trajectory import Condition
from ddpo.validation import check

if TYPE_CHECKING:  # the configurations of objectives are read without loading diffusers
    from ddpo.policy import Policy

Preset = Literal["dpo", "kto", "d3po", "spo"]
BETA: Mapping[Preset, float] = {"dpo": 2000.0, "kto": 2000.0, "d3po": 0.1, "spo": 10.0}
SPO_MARGIN = 0.3
ON_CLEAN_SAMPLES: tuple[Preset, ...] = ("dpo", "kto")


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Learning from preferences.

    Attributes:
        preset: `dpo` compares errors of the network on noised images, `kto` likes and dislikes them one by one, `d3po`
            compares the densities of sampled steps, `spo` those of several next states from one state, of which the
            clean images predicted from them are scored.
        beta: Log-odds per unit of what is compared: of the mean squared error over the dimensions for `dpo` and `kto`
            (half of it for `dpo`), of the mean log-ratio over the dimensions for `d3po` and `spo`. Weighs the
            pretrained model. null takes the published 2000 of Stable Diffusion 1.5 (`dpo`; `kto` the same), 0.1
            (`d3po`), 10 (`spo`).
        noises: With `dpo` and `kto`: noises of an image and pass, each at its own denoising step; a pair gets those of
            all samples of its group.
        draws: With `dpo`: noises over which the error is averaged inside the sigmoid; each takes rows and memory.
        margin: Pairs whose scores differ by less are skipped, in reward units; 0 skips equal ones only. null takes the
            published 0.3 for `spo`, 0 else.
        first_step: With `spo`: the first stochastic step, from 0, at which next states are compared.
        contenders: With `spo`: next states from each of these states; the best is compared with the worst.
        clip: With `d3po` and `spo`: ratios of densities (the D-th root) are clamped to 1 +- this; null for never.
        train_guidance: `none` trains the conditional branch alone, as published for `dpo` and `kto`; `same` the guided
            policy that is sampled from, as for `d3po` and, always, `spo`. null takes that.
        updates_per_epoch: Optimizer steps per inner epoch; each takes its own share of every sample's units.
        inner_epochs: Passes over an epoch's samples, with fresh noises.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["preference"] = "preference"
    preset: Preset = "dpo"
    beta: float | None = None
    noises: int = 1
    draws: int = 1
    margin: float | None = None
    first_step: int = 4
    contenders: int = 4
    clip: float | None = 0.1
    train_guidance: Literal["same", "none"] | None = None
    updates_per_epoch: int = 1
    inner_epochs: int = 1

    def __post_init__(self) -> None:
        check(self.beta is None or 0 < self.beta < math.inf, "beta", self.beta, "positive and finite, or null")
        check(
            self.margin is None or 0 <= self.margin < math.inf, "margin", self.margin, "at least 0 and finite, or null"
        )
        check(self.first_step >= 0, "first_step", self.first_step, "at least 0")
        check(self.contenders >= 2, "contenders", self.contenders, "at least 2")
        check(self.clip is None or 0 < self.clip < 1, "clip", self.clip, "in (0, 1) or null")
        for name in ("noises", "draws", "updates_per_epoch", "inner_epochs"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        cure = f"1 with preset: {self.preset} (it averages no noises inside a sigmoid)"
        check(self.draws == 1 or self.preset == "dpo", "draws", self.draws, cure)
        cure = f"1 with preset: {self.preset} (its units are the steps that sampling took)"
        check(self.noises == 1 or self.preset in ON_CLEAN_SAMPLES, "noises", self.noises, cure)
        cure = f"4 with preset: {self.preset} (spo alone compares next states)"
        for name in ("first_step", "contenders"):
            check(getattr(self, name) == 4 or self.preset == "spo", name, getattr(self, name), cure)
        cure = f"0.1 with preset: {self.preset} (it has no ratio of densities; d3po and spo do)"
        check(self.clip == 0.1 or self.preset not in ON_CLEAN_SAMPLES, "clip", self.clip, cure)
        cure = "0 or null with preset: kto (it compares no pairs)"
        check(not self.margin or self.preset != "kto", "margin", self.margin, cure)
        cure = "same or null with preset: spo (its next states are those that sampling could have taken)"
        check(self.preset != "spo" or self.train_guidance != "none", "train_guidance", self.train_guidance, cure)

    def build(self) -> "PreferredNoises | LikedNoises | PreferredSteps | ContendedSteps":
        """The objective with these keys."""
        beta = BETA[self.preset] if self.beta is None else self.beta
        published = "none" if self.preset in ON_CLEAN_SAMPLES else "same"
        demand = Demand(
            name=self.preset,
            unit="noise",
            units=lambda num_stochastic: self.noises,
            updates=self.updates_per_epoch,
            passes=self.inner_epochs,
            guidance=(self.train_guidance or published) == "same",
            frozen_passes=1,
        )
        default = SPO_MARGIN if self.preset == "spo" else 0.0
        margin = default if self.margin is None else self.margin
        if self.preset == "d3po":
            return PreferredSteps(demand=steps_of_pairs(demand), beta=beta, clip=self.clip, margin=margin)
        if self.preset == "spo":
            demand = contended_steps(demand, first=self.first_step, contenders=self.contenders)
            return ContendedSteps(demand=demand, beta=beta, clip=self.clip, margin=margin)
        if self.preset == "kto":
            return LikedNoises(demand=replace(demand, survey=True, frozen_passes=3), noises=self.noises, beta=beta)
        demand = replace(demand, unit="pair noise", rows=2 * self.draws, whole_groups=True, margin=margin)
        return PreferredNoises(demand=demand, noises=self.noises, draws=self.draws, beta=beta, margin=margin)


# ---- images whose order is known, noised -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NoisedPairs:
    """A micro-batch of N pairs of clean latents with R noises each, the same for both of a pair.

    Attributes:
        steps: Step k at whose noise level each is, (N, R) int64.
        better: Clean latents, (N, *latent).
        worse: Clean latents, (N, *latent).
        eps: Standard normal noise, (N, R, *latent).
        weight: Of the pairs, (N,), with mean 1 over an epoch; 0 where one is skipped.
        condition: N rows of the better, then N of the worse.
    """

    steps: Tensor
    better: Tensor
    worse: Tensor
    eps: Tensor
    weight: Tensor
    condition: Condition


@dataclass(frozen=True, kw_only=True)
class PreferredNoises:
    """Diffusion-DPO: a unit is a noise of the pair of a sample's group, or several inside one sigmoid.

    Attributes:
        demand: The clean latents of whole groups.
        noises: Units of a sample and pass.
        draws: Noises of a unit.
        beta: See the configuration.
        margin: See the configuration.
    """

    demand: Demand
    noises: int
    draws: int
    beta: float
    margin: float

    def gather(self, experience: Experience, rows: Tensor, slots: Tensor, *, seed: int) -> NoisedPairs:
        """Noises number `slots` of the pairs of samples `rows`: functions of the pass, the sample's seed, the slot."""
        path, device = experience.trajectory, experience.trajectory.log_probs.device
        pairs = best_and_worst(experience.scores, experience.groups, margin=self.margin)
        places = experience.start + rows
        better, worse = pairs.better[places] - experience.start, pairs.worse[places] - experience.start
        own = torch.arange(self.draws).repeat(len(rows)) + self.draws * slots.repeat_interleave(self.draws)
        each = rows.repeat_interleave(self.draws)
        steps, eps = _noises(experience, each, own, seed=seed, strata=self.noises * self.draws)
        both = torch.cat([better, worse])
        return NoisedPairs(
            steps=steps.reshape(len(rows), self.draws),
            better=fetch(path.final[better], device),
            worse=fetch(path.final[worse], device),
            eps=eps.reshape(len(rows), self.draws, *eps.shape[1:]).to(device),
            weight=pairs.weight[places].to(device, torch.float32),
            condition=path.condition.index(both).to(device),
        )

    def losses(self, models: Models, batch: NoisedPairs) -> Iterator[Loss]:
        """The logistic loss of the difference of the errors' changes."""
        count, draws = batch.steps.shape
        clean = torch.cat([batch.better, batch.worse]).repeat_interleave(draws, 0)
        steps, eps = batch.steps.flatten().repeat(2), batch.eps.flatten(0, 1).repeat(2, *[1] * (clean.ndim - 1))
        condition = batch.condition.index(torch.arange(2 * count).repeat_interleave(draws))
        change = error_change(models.policy, steps, clean, eps, condition)
        better, worse = change.reshape(2, count, draws).mean(2)
        logits = -0.5 * self.beta * (better - worse)
        metrics = {
            **compared(logits, batch.weight),
            "better_error_change": batch.weight * better.detach(),
            "worse_error_change": batch.weight * worse.detach(),
        }
        steps_of_units = batch.steps[:, 0] if draws == 1 else None
        yield Loss(value=(batch.weight * preference_loss(logits)).mean(), metrics=metrics, steps=steps_of_units)


# ---- images that are liked or not, noised ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NoisedLikes:
    """A micro-batch of N noises of clean latents.

    Attributes:
        steps: Step k at whose noise level each is, (N,) int64.
        clean: Clean latents, (N, *latent).
        eps: Standard normal noise, (N, *latent).
        sign: 1 for a liked image, -1 for one that is not, 0 for one of which nothing is known, (N,).
        condition: N rows.
    """

    steps: Tensor
    clean: Tensor
    eps: Tensor
    sign: Tensor
    condition: Condition


@dataclass(frozen=True, kw_only=True)
class LikedNoises:
    """Diffusion-KTO: a unit is a noise; an image is liked if it is better than its baseline.

    Attributes:
        demand: The clean latents, and the mean change of the errors over a whole update before its losses.
        noises: Of an image and pass.
        beta: See the configuration.
    """

    demand: Demand
    noises: int
    beta: float

    def gather(self, experience: Experience, rows: Tensor, slots: Tensor, *, seed: int) -> NoisedLikes:
        """Noise number `slots` of samples `rows`: a function of the pass, the sample's own seed and the slot."""
        path, device = experience.trajectory, experience.trajectory.log_probs.device
        steps, eps = _noises(experience, rows, slots, seed=seed, strata=self.noises)
        return NoisedLikes(
            steps=steps,
            clean=fetch(path.final[rows], device),
            eps=eps.to(device),
            sign=experience.advantages[rows, 0].sign(),
            condition=path.condition.index(rows).to(device),
        )

    def survey(self, models: Models, batch: NoisedLikes) -> Tensor:
        """-d of every unit, (N,): its mean over the update is how far the policy has moved, K."""
        return -error_change(models.policy, batch.steps, batch.clean, batch.eps, batch.condition)

    def losses(self, models: Models, batch: NoisedLikes) -> Iterator[Loss]:
        """One minus the utility of each image."""
        assert models.surveyed is not None, "the update has been surveyed"
        gain = -error_change(models.policy, batch.steps, batch.clean, batch.eps, batch.condition)
        utility = torch.sigmoid(self.beta * batch.sign * (gain - models.surveyed.clamp(min=0)))
        metrics = {
            "utility": utility.detach(),
            "liked_error_change": -(batch.sign > 0).to(gain) * gain.detach(),
            "disliked_error_change": -(batch.sign < 0).to(gain) * gain.detach(),
            "kto_baseline": models.surveyed.clamp(min=0).expand_as(gain),
        }
        yield Loss(value=(batch.sign.abs() * (1 - utility)).mean(), metrics=metrics, steps=batch.steps)


def error_change(policy: "Policy", steps: Tensor, clean: Tensor, eps: Tensor, condition: Condition) -> Tensor:
    """By how much the error of the network's output is larger than the pretrained network's, d of the docstring, (N,).

    Args:
        policy: The view that is trained.
        steps: (N,) int64.
        clean: Clean latents, (N, *latent).
        eps: Noise, (N, *latent).
        condition: N rows.
    """
    x = policy.schedule.noised(steps, clean, eps)
    policy = policy.at(replace(policy.schedule, clip=None))  # a clamped prediction would have no gradient
    target = policy.network_output(steps, Prediction(x0=clean, eps=eps))

    def error() -> Tensor:
        output = policy.network_output(steps, policy.predict(steps, x, condition))
        return (output - target).square().flatten(1).mean(1)

    with policy.reference():
        pretrained = error()
    return error() - pretrained


def _noises(experience: Experience, rows: Tensor, slots: Tensor, *, seed: int, strata: int) -> tuple[Tensor, Tensor]:
    """Steps (N,) and noises (N, *latent) on the CPU; a sample's noises share the chain's steps out among them."""
    path = experience.trajectory
    samples = path.seeds[rows.to(path.seeds.device)].tolist()
    shares = step_shares(path.schedule, "grid", skip=0)
    like = path.final[:1].expand(len(rows), *path.final.shape[1:])
    return draw_noises(seed, samples, slots.tolist(), shares, strata=strata, like=like)
