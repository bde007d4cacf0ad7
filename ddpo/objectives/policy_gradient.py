"""REINFORCE and PPO on denoising steps, with the KL to the pretrained model.

The objective is J = E[r(x_0)] - alpha * E[sum_k KL_k], KL_k = KL(pi_theta(.|x_k) || pi_ref(.|x_k)). With the advantages
A_k of `ddpo.advantages` (which hold the cost-to-go of the future KL) its gradient over the B x T transitions is

    grad J = E[ sum_k A_k grad log pi(x_{k+1}|x_k) ] - alpha E[ sum_k grad KL_k ]

and the loss, a mean over transitions, has the gradient -grad J / (T D), D the number of latent dimensions: step sizes
and gradient norms then carry over between resolutions and numbers of steps.

    reinforce            -A log pi / D                                                (Williams 1992)
    ppo, joint           -min(A rho, A clip(rho, 1 +- eps)) / D,  rho = pi / pi_old   (PPO, arXiv:1707.06347)
    ppo, per_dimension   -min(A rho, A clip(rho, 1 +- eps)),      rho = (pi / pi_old)^(1/D)

The last is what DDPO (arXiv:2305.13301) and Flow-GRPO compute by averaging the log-density over dimensions. Its clip is
far looser than it looks: |log pi/pi_old| <= eps D nats, 1.6 nats for eps = 1e-4 and Stable Diffusion's D = 16,384. At
pi = pi_old all three have the same gradient.

Deviation from the papers: the KL term of later updates is taken at the states of the sampling policy, unweighted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ddpo.objectives.base import Loss, Objective
from ddpo.trajectory import Transitions
from ddpo.validation import check

if TYPE_CHECKING:
    from ddpo.policy import Policy


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig:
    """REINFORCE or PPO on the denoising steps.

    Attributes:
        surrogate: `reinforce` is on-policy and exact: one update of one inner epoch per set of samples. `ppo` corrects
            for the change of the policy within an epoch by the importance ratio, and clips it.
        ratio: `joint` is the true ratio of a step's densities. `per_dimension` is its D-th root (D the number of latent
            dimensions), which is what DDPO and Flow-GRPO clip.
        clip_range: Half-width of the clip around 1; null takes 0.2 for `joint`, 1e-4 for `per_dimension` (DDPO's).
        train_guidance: `same` trains the guided policy that was sampled from. `none` trains the conditional branch
            alone, at half the cost; the samples then come from another policy, which is an approximation.
        step_fraction: Share of each sample's stochastic steps that is trained on, drawn anew per inner epoch.
        updates_per_epoch: Optimizer steps per inner epoch; each takes its own share of every sample's steps.
        inner_epochs: Passes over an epoch's samples.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["policy_gradient"] = "policy_gradient"
    surrogate: Literal["ppo", "reinforce"] = "ppo"
    ratio: Literal["joint", "per_dimension"] = "per_dimension"
    clip_range: float | None = None
    train_guidance: Literal["same", "none"] = "same"
    step_fraction: float = 1.0
    updates_per_epoch: int = 2
    inner_epochs: int = 1

    def __post_init__(self) -> None:
        check(self.clip_range is None or self.clip_range > 0, "clip_range", self.clip_range, "positive or null")
        check(0 < self.step_fraction <= 1, "step_fraction", self.step_fraction, "in (0, 1]")
        check(self.updates_per_epoch >= 1, "updates_per_epoch", self.updates_per_epoch, "at least 1")
        check(self.inner_epochs >= 1, "inner_epochs", self.inner_epochs, "at least 1")
        on_policy = self.updates_per_epoch == self.inner_epochs == 1
        check(
            self.surrogate == "ppo" or on_policy,
            "updates_per_epoch",
            self.updates_per_epoch,
            "1, as must inner_epochs, with surrogate: reinforce (it is on-policy; use ppo for several updates)",
        )

    @property
    def effective_clip_range(self) -> float:
        """`clip_range`, or the default that belongs to the ratio."""
        if self.clip_range is not None:
            return self.clip_range
        return 0.2 if self.ratio == "joint" else 1e-4


def policy_gradient(config: PolicyGradientConfig) -> Objective:
    """The objective of a configuration: yields one loss per micro-batch."""
    surrogate = {"reinforce": reinforce_loss, "ppo": ppo_loss}[config.surrogate]
    guided = config.train_guidance == "same"

    def objective(policy: "Policy", batch: Transitions) -> Iterator[Loss]:
        distribution = policy(batch.steps, batch.latents, batch.condition, guided=guided)
        dims = batch.latents[0].numel()
        log_ratio = distribution.log_prob(batch.next_latents) - batch.log_probs
        power = 1 / dims if config.ratio == "per_dimension" else 1.0
        loss, clipped = surrogate(log_ratio, batch.advantages, power=power, clip_range=config.effective_clip_range)
        metrics = {"log_ratio": log_ratio.detach(), "clipped": clipped}
        if batch.penalised:
            with policy.reference():
                reference = policy(batch.steps, batch.latents, batch.condition, guided=guided)
            kl = distribution.kl(reference)
            loss = loss + batch.kl_weight * kl
            metrics["kl"] = kl.detach()
        yield Loss(value=loss.mean() / dims * batch.share, metrics=metrics)

    return objective


def reinforce_loss(log_ratio: Tensor, advantages: Tensor, *, power: float, clip_range: float) -> tuple[Tensor, Tensor]:
    """-A log pi, up to a constant; valid only at the sampling parameters.

    Args:
        log_ratio: log pi - log pi_old of N transitions, (N,) nats.
        advantages: (N,).
        power: Unused; the gradient does not depend on it.
        clip_range: Unused; there is nothing to clip on-policy.

    Returns:
        Losses (N,) whose gradient is -A grad log pi, and whether the clip was active, (N,) float.
    """
    return -advantages * log_ratio, torch.zeros_like(log_ratio)


def ppo_loss(log_ratio: Tensor, advantages: Tensor, *, power: float, clip_range: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate on rho = exp(power * log_ratio), divided by `power` (arXiv:1707.06347, eq. 7).

    Args:
        log_ratio: log pi - log pi_old of N transitions, (N,) nats.
        advantages: (N,).
        power: 1 for the true ratio, 1/D for its D-th root.
        clip_range: Half-width of the clip of rho around 1.

    Returns:
        Losses (N,) whose gradient at rho = 1 is -A grad log pi, and whether the clip was active, (N,) float.
    """
    ratio = torch.exp(power * log_ratio)
    free = advantages * ratio
    bounded = advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(free, bounded) / power, (bounded < free).detach().float()
