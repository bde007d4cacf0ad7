"""REINFORCE and PPO on denoising steps, with the KL to the pretrained model.

The objective is J = E[r(x_T)] - alpha * E[sum_k KL_k], KL_k = KL(pi_theta(.|x_k) || pi_ref(.|x_k)). With the advantages
A_k of `ddpo.credit.advantages` (which hold the cost-to-go of the future KL) its gradient over the B x T transitions is

    grad J = E[ sum_k A_k grad log pi(x_{k+1}|x_k) ] - alpha E[ sum_k grad KL_k ]

and the loss, a mean over transitions, has the gradient -grad J / (T D), D the number of latent dimensions: step sizes
and gradient norms then carry over between resolutions and numbers of steps.

    reinforce            -A log pi / D                                                (Williams 1992)
    ppo, joint           -min(A rho, A clip(rho, 1 +- eps)) / D,  rho = pi / pi_old   (PPO, arXiv:1707.06347)
    ppo, per_dimension   -min(A rho, A clip(rho, 1 +- eps)),      rho = (pi / pi_old)^(1/D)

The last is what DDPO (arXiv:2305.13301) and Flow-GRPO compute by averaging the log-density over dimensions. Its clip is
far looser than it looks: |log pi/pi_old| <= eps D nats, 1.6 nats for eps = 1e-4 and Stable Diffusion's D = 16,384. The
ratio of GRPO-Guard, and Flow-DPPO's mask in place of the clip, are in `ddpo.objectives.surrogates`. At pi = pi_old all
of them have the same gradient.

    step_weight: noise_level    step k's terms, its KL's too, times s_k / mean_j s_j       (TempFlow, arXiv:2508.04324)

changes the gradient: it is that of J where every step has weights of its own, up to the length of each step's part, and
the optimum is then the same; where steps share their weights it points elsewhere (`ddpo verify --only gradient`).

Deviation from the papers: the KL term of later updates is taken at the states of the sampling policy, unweighted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ddpo.objectives.base import Demand, Loss, Models
from ddpo.objectives.experience import Experience
from ddpo.objectives.surrogates import centred_log_ratio, masked_loss, ppo_loss, reinforce_loss
from ddpo.objectives.unseen_steps import WithUnseenSteps, with_chain
from ddpo.placement import fetch
from ddpo.sampling.gaussian import Gaussian
from ddpo.sampling.schedule import Schedule
from ddpo.trajectory import Condition, Keep
from ddpo.validation import check

if TYPE_CHECKING:  # configurations are read without loading diffusers
    from ddpo.policy import Policy


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig:
    """REINFORCE or PPO on the denoising steps.

    Attributes:
        surrogate: `reinforce` is on-policy and exact: one update of one inner epoch per set of samples. `ppo` corrects
            for the change of the policy within an epoch by the importance ratio, and clips it.
        ratio: `joint` is the true ratio of a step's densities. `per_dimension` is its D-th root (D the number of latent
            dimensions), which is what DDPO and Flow-GRPO clip. `guard` (GRPO-Guard) has the same mean 1 and the same
            spread in latent units at every step, so that the clip binds all alike; the means of sampling are kept.
        clip_range: Half-width of the clip around 1; null takes 0.2 for `joint`, 1e-4 for `per_dimension` (DDPO's), 2e-6
            for `guard`.
        mask: `kl` drops, in place of the clip, the terms that would drive a step further from the policy that sampled
            than `mask_nats` (Flow-DPPO); the means of sampling are kept.
        mask_nats: With `mask: kl`, the KL of a step's distribution to that which sampled, nats, from which on it is
            held; null takes 0.02, a ratio whose logarithm has the spread 0.2.
        step_weight: `noise_level` weighs each step's terms by its noise over the mean one (TempFlow): a bias where
            steps share their weights. `none` is the gradient of the objective.
        train_guidance: `same` trains the guided policy that was sampled from. `none` trains the conditional branch
            alone, at half the cost; the samples then come from another policy, so that its gradient is not that of the
            reward. The KL that training measures, weighs and bounds is then the conditional policy's; an evaluation's
            is that of the guided policy, another number.
        noise_free_steps: What becomes of steps without noise, whose weights no likelihood sees. `ignored` leaves their
            part of the gradient out (docs/samplers.md). `pathwise` adds it: the derivative of the reward, and of the
            weighted KL after them, through these steps, so that the gradient is that of the objective; for rewards
            with derivatives, at one more term an image, a chain from the first such step to the scored picture.
        step_fraction: Share of each sample's stochastic steps that is trained on, drawn anew per inner epoch.
        updates_per_epoch: Optimizer steps per inner epoch; each takes its own share of every sample's steps.
        inner_epochs: Passes over an epoch's samples.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["policy_gradient"] = "policy_gradient"
    surrogate: Literal["ppo", "reinforce"] = "ppo"
    ratio: Literal["joint", "per_dimension", "guard"] = "per_dimension"
    clip_range: float | None = None
    mask: Literal["none", "kl"] = "none"
    mask_nats: float | None = None
    step_weight: Literal["none", "noise_level"] = "none"
    train_guidance: Literal["same", "none"] = "same"
    noise_free_steps: Literal["ignored", "pathwise"] = "ignored"
    step_fraction: float = 1.0
    updates_per_epoch: int = 2
    inner_epochs: int = 1

    def __post_init__(self) -> None:
        check(self.clip_range is None or self.clip_range > 0, "clip_range", self.clip_range, "positive or null")
        check(0 < self.step_fraction <= 1, "step_fraction", self.step_fraction, "in (0, 1]")
        check(self.updates_per_epoch >= 1, "updates_per_epoch", self.updates_per_epoch, "at least 1")
        check(self.inner_epochs >= 1, "inner_epochs", self.inner_epochs, "at least 1")
        check(
            self.surrogate == "ppo" or self.is_on_policy,
            "updates_per_epoch",
            self.updates_per_epoch,
            "1, as must inner_epochs, with surrogate: reinforce (it is on-policy; use ppo for several updates)",
        )
        ppo, masked = self.surrogate == "ppo", self.mask == "kl"
        alone = "with surrogate: reinforce (it is on-policy and has no ratio)"
        check(ppo or self.ratio != "guard", "ratio", self.ratio, f"joint or per_dimension {alone}")
        check(ppo or not masked, "mask", self.mask, f"none {alone}")
        check(self.mask_nats is None or self.mask_nats > 0, "mask_nats", self.mask_nats, "positive or null")
        check(masked or self.mask_nats is None, "mask_nats", self.mask_nats, "null without mask: kl")
        instead = "null with mask: kl (it takes the place of the clip; its bound is mask_nats)"
        check(not masked or self.clip_range is None, "clip_range", self.clip_range, instead)

        whole = self.noise_free_steps == "ignored" or (self.step_weight, self.train_guidance) == ("none", "same")
        cure = "ignored with another step_weight than none, or train_guidance than same (both change the gradient)"
        check(whole, "noise_free_steps", self.noise_free_steps, cure)

    @property
    def is_on_policy(self) -> bool:
        """Whether an epoch has one update, whose ratios are all 1."""
        return self.updates_per_epoch == self.inner_epochs == 1

    @property
    def effective_clip_range(self) -> float:
        """`clip_range`, or the default that belongs to the ratio."""
        defaults = {"joint": 0.2, "per_dimension": 1e-4, "guard": 2e-6}
        return defaults[self.ratio] if self.clip_range is None else self.clip_range

    @property
    def effective_mask_nats(self) -> float:
        """`mask_nats`, or its default."""
        return 0.02 if self.mask_nats is None else self.mask_nats

    def build(self) -> "PolicyGradient | WithUnseenSteps":
        """The objective with these keys."""
        masked = self.mask == "kl"
        ppo = (masked_loss, self.effective_mask_nats) if masked else (ppo_loss, self.effective_clip_range)
        surrogate, bound = (reinforce_loss, 0.0) if self.surrogate == "reinforce" else ppo
        seen = PolicyGradient(
            demand=Demand(
                name=self.surrogate,
                unit="stochastic step",
                units=lambda num_stochastic: num_stochastic,
                fraction=self.step_fraction,
                updates=self.updates_per_epoch,
                passes=self.inner_epochs,
                guidance=self.train_guidance == "same",
                likelihood=True,
                recorded=self.noise_free_steps == "ignored",
                keep=Keep.ALL,
                means=masked or self.ratio == "guard",
                reference_means=True,
                spares=True,
                joint_ratio=self.ratio == "joint" and not self.is_on_policy,
            ),
            surrogate=surrogate,
            bound=bound,
            per_dimension=self.ratio == "per_dimension",
            guarded=self.ratio == "guard",
            by_noise=self.step_weight == "noise_level",
        )
        if self.noise_free_steps == "ignored":
            return seen
        return WithUnseenSteps(demand=with_chain(seen.demand), seen=seen)


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """A micro-batch of N independent denoising steps, of any samples and steps.

    Attributes:
        steps: Denoising step indices, (N,) int64.
        latents: x_k, (N, *latent).
        next_latents: x_{k+1}, (N, *latent).
        log_probs: log pi_old(x_{k+1} | x_k), (N,) nats.
        old_mean: Mean of pi_old(. | x_k), (N, *latent); None where it is not kept.
        reference_mean: The pretrained model's, (N, *latent); None where it is not kept.
        advantages: (N,).
        kl_weight: (N,), see `Experience`.
        penalised: Whether the loss has a KL term.
        weights: Of the terms, (N,), with mean 1 over the stochastic steps; None where all are 1.
        condition: N rows.
    """

    steps: Tensor
    latents: Tensor
    next_latents: Tensor
    log_probs: Tensor
    old_mean: Tensor | None
    reference_mean: Tensor | None
    advantages: Tensor
    kl_weight: Tensor
    penalised: bool
    weights: Tensor | None
    condition: Condition

    def __len__(self) -> int:
        return self.steps.shape[0]


Surrogate = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """REINFORCE or PPO: a unit is a stochastic step.

    Attributes:
        demand: Log-probabilities, of every stochastic step.
        surrogate: Of `ddpo.objectives.surrogates`.
        bound: Half-width of the clip of the ratio around 1, or of a mask nats.
        per_dimension: Whether the ratio is the D-th root of the densities'.
        guarded: Whether it is that of GRPO-Guard.
        by_noise: Whether steps count by their noise.
    """

    demand: Demand
    surrogate: Surrogate
    bound: float
    per_dimension: bool
    guarded: bool
    by_noise: bool

    def gather(self, experience: Experience, rows: Tensor, slots: Tensor, *, seed: int) -> Transitions:
        """The transitions of samples `rows` at their stochastic steps number `slots`; nothing is drawn."""
        path, device, steps = experience.trajectory, experience.trajectory.log_probs.device, experience.decisions[slots]
        return Transitions(
            steps=steps,
            latents=fetch(path.latents[rows, steps], device),
            next_latents=fetch(path.latents[rows, steps + 1], device),
            log_probs=path.log_probs[rows, steps],
            old_mean=None if path.means is None else fetch(path.means[rows, slots], device),
            reference_mean=None if path.reference_means is None else fetch(path.reference_means[rows, slots], device),
            advantages=experience.advantages[rows, steps],
            kl_weight=experience.kl_weight[rows],
            penalised=experience.penalised,
            weights=noise_weights(path.schedule, steps) if self.by_noise else None,
            condition=path.condition.index(rows).to(device),
        )

    def idle(self, experience: Experience) -> Tensor:
        """Those without advantage at any step, as all of a group of equal scores; none where the KL has a weight."""
        if experience.penalised:
            return torch.zeros_like(experience.kl_weight, dtype=torch.bool)
        return (experience.advantages == 0).all(dim=1)

    def losses(self, models: Models, batch: Transitions) -> Iterator[Loss]:
        """The surrogate, and the KL penalty where it has a weight."""
        policy = models.policy
        distribution = policy(batch.steps, batch.latents, batch.condition)
        dims = batch.latents[0].numel()
        log_ratio = distribution.log_prob(batch.next_latents) - batch.log_probs
        nats = log_ratio.detach()
        power: Tensor | float = 1 / dims if self.per_dimension else 1.0
        if self.guarded:
            assert batch.old_mean is not None, "the means of sampling are kept"
            log_ratio = centred_log_ratio(distribution, batch.next_latents, batch.old_mean)
            power = distribution.std.flatten().double() / dims
        moved = None if batch.old_mean is None else replace(distribution, mean=batch.old_mean).kl(distribution).detach()
        loss, dropped = self.surrogate(log_ratio, batch.advantages, power=power, bound=self.bound, divergence=moved)
        metrics = {"log_ratio": power * log_ratio.detach(), "log_ratio_nats": nats, "clip_fraction": dropped}
        if moved is not None:
            metrics["old_kl_nats"] = moved
        if batch.penalised:
            kl = distribution.kl(self._reference(policy, batch, distribution))
            loss = loss + batch.kl_weight * kl
            metrics["step_kl_nats"] = kl.detach()
        if batch.weights is not None:
            loss = batch.weights * loss
        yield Loss(value=loss.mean() / dims, metrics=metrics, steps=batch.steps, drift=nats.abs())

    def distribution(self, models: Models, batch: Transitions) -> Gaussian:
        """The policy's at the recorded states."""
        return models.policy(batch.steps, batch.latents, batch.condition)

    def improvement(self, models: Models, batch: Transitions, distribution: Gaussian) -> Tensor:
        """A pi / pi_old less the weighted KL, whatever ratio and bound the losses have."""
        worth = batch.advantages * (distribution.log_prob(batch.next_latents) - batch.log_probs).exp()
        if batch.penalised:
            worth = worth - batch.kl_weight * distribution.kl(self._reference(models.policy, batch, distribution))
        return worth if batch.weights is None else batch.weights * worth

    def _reference(self, policy: "Policy", batch: Transitions, distribution: Gaussian) -> Gaussian:
        """The pretrained model's step, of the same std: as sampling has found it, or by a pass of its own."""
        if batch.reference_mean is not None:
            return replace(distribution, mean=batch.reference_mean)
        with policy.reference():
            return policy(batch.steps, batch.latents, batch.condition)


def noise_weights(schedule: Schedule, steps: Tensor) -> Tensor:
    """The std of the given steps over its mean over the stochastic ones, (N,), float32 on the schedule's device."""
    stds = schedule.std[schedule.stochastic]
    return schedule.std[steps.to(stds.device)] / stds.mean()
