"""Feynman-Kac steering (Singhal et al., arXiv:2501.06848): particles that a reward's estimates on the way multiply.

    log G_k = r_k - r_prev (difference) | max_{j <= k} r_j (max) | sum_{j <= k} r_j (add),  r_k = r(x0_hat(x_k)) / alpha
    log G_T = r(x_T) / alpha - sum of the log G_k before

The product of the potentials is exp(r(x_T) / alpha), whichever was chosen. So the weighted particles are of the tilted
law p(x_T) exp(r / alpha) / Z of the chain's own end as P grows, with an error of 1 / sqrt(P), and the estimate of Z is
unbiased for every P (Del Moral 2004, theorem 7.4.2). Weights are carried where nothing is resampled; the reference code
forgets them, which is biased. The estimate needs no pass of the network: the step has predicted x0_hat. Particles are
resampled before the step's noise is drawn, so that copies part at once.

B = G P rows: particles of a sample stand next to each other.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ddpo.steering.base import Draw, Score, Selection, State, Steer, Value, Weighing
from ddpo.steering.particles import Resampling, effective_size, log_mean, resample, uniforms

if TYPE_CHECKING:  # the policy loads diffusers
    from ddpo.policy import Policy

Potential = Literal["difference", "max", "add"]


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What particles carry from step to step.

    Attributes:
        log_weights: Since they were last resampled, (B,) float64.
        spent: Sum of the log-potentials so far, (B,) float64.
        previous: What the next potential refers to, (B,) float64.
        log_z: Log of the mean weights at the resamplings so far, (G,) float64.
    """

    log_weights: Tensor
    spent: Tensor
    previous: Tensor
    log_z: Tensor


@dataclass(frozen=True, kw_only=True)
class FeynmanKac(Steer):
    """Steers particles; see the module docstring.

    Attributes:
        score: r.
        alpha: Reward units per nat.
        particles: P.
        steps: Before which the particles are weighed.
        potential: Which G_k.
        resampling: How.
        threshold: Resampled where the effective size is below this share of P; 1 for always.
        value: Takes the place of r(x0_hat(x_k)); None for it.
        carried: None before the first step.
    """

    score: Score
    alpha: float
    particles: int
    steps: tuple[int, ...]
    potential: Potential = "difference"
    resampling: Resampling = "systematic"
    threshold: float = 0.5
    value: Value | None = None
    carried: Carried | None = None

    def select(self, draw: Draw, policy: "Policy") -> Selection:
        """Resamples where weights have become uneven."""
        state, carried, ancestors = draw.state, self.carried or self._start(draw), None
        latents = draw.candidates
        if state.k in self.steps:
            carried, chosen = self._resampled(self._weighed(carried, self._estimates(state, policy)), state)
            ancestors = chosen.to(latents.device)
            latents = draw.of(ancestors)
        return Selection(latents=latents, ancestors=ancestors, then=replace(self, carried=carried))

    def weigh(self, scores: Tensor) -> Weighing:
        """By the last potential, which makes the product of all of them exp(r / alpha)."""
        assert self.carried is not None, "after the last step"
        left = (self.carried.log_weights - self.carried.spent).view_as(scores)
        log_weights = left + scores / self.alpha
        return Weighing(log_weights=log_weights, log_z=self.carried.log_z + log_mean(log_weights))

    def _start(self, draw: Draw) -> Carried:
        rows = len(draw.candidates)
        zeros = torch.zeros(rows, dtype=torch.float64)
        first = zeros - math.inf if self.potential == "max" else zeros
        return Carried(log_weights=zeros, spent=zeros, previous=first, log_z=zeros[: rows // self.particles])

    def _estimates(self, state: State, policy: "Policy") -> Tensor:
        """What the reward may become, over alpha, (B,) float64 on the CPU."""
        if self.value is None:
            found = self.score(policy.decode(state.prediction.x0), torch.arange(len(state.x)))
        else:
            found = self.value(state.k, state.x, state.condition)
        return found.double().cpu() / self.alpha

    def _weighed(self, carried: Carried, reward: Tensor) -> Carried:
        match self.potential:
            case "difference":
                log_potential, previous = reward - carried.previous, reward
            case "max":
                log_potential = previous = torch.maximum(carried.previous, reward)
            case "add":
                log_potential = previous = carried.previous + reward
        return replace(
            carried,
            log_weights=carried.log_weights + log_potential,
            spent=carried.spent + log_potential,
            previous=previous,
        )

    def _resampled(self, carried: Carried, state: State) -> tuple[Carried, Tensor]:
        """The particles after resampling, and whom each continues, (B,)."""
        groups = carried.log_weights.view(-1, self.particles)
        own = torch.arange(groups.numel()).view_as(groups)
        uneven = effective_size(groups) < self.threshold * self.particles
        numbers = uniforms(state.seeds[:: self.particles], state.k, self.particles)
        chosen = own[:, :1] + resample(groups, numbers, self.resampling)
        ancestors = torch.where(uneven[:, None], chosen, own).flatten()
        kept = torch.where(uneven[:, None], 0.0, groups).flatten()
        return Carried(
            log_weights=kept,
            spent=carried.spent[ancestors],
            previous=carried.previous[ancestors],
            log_z=carried.log_z + torch.where(uneven, log_mean(groups), 0.0),
        ), ancestors
