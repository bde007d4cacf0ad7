"""What steering is: two hooks in every step of a rollout and one at its end, all the identity by default.

    state      = x_k, and what the policy sees and would do there
    proposal   = propose(state)                     shift the mean: guidance by a reward or a value
    candidates ~ proposal
    x_{k+1}    = select(draw)                       choose among them: resampling, a corrector
    weights    = weigh(scores)                      of particles, by which one of them is taken

A steering is a frozen object. It holds what it needs besides the policy, such as a score of images, and what it carries
from step to step, such as log-weights: each selection names the steering of the next step. B is the batch.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpo.sampling.gaussian import Gaussian
from ddpo.sampling.prediction import Prediction
from ddpo.seeds import fill_normal, stream
from ddpo.trajectory import Condition

if TYPE_CHECKING:  # the policy loads diffusers
    from ddpo.policy import Outputs, Policy

Score = Callable[[Tensor, Tensor], Tensor]
"""Rewards (N,) of images (N, 3, H, W) in [0, 1] of these rows (N,) of the batch."""

Value = Callable[[int, Tensor, Condition], Tensor]
"""V_k(x) in reward units, (B,), of k from 0 to T, states x_k (B, *latent) and their condition; x_T are the ends."""

FIRST_KEY = 2  # second key of a candidate's noise; 0 is the chain's own, 1 that of contenders


@dataclass(frozen=True, kw_only=True)
class State:
    """Where B chains stand before a step.

    Attributes:
        k: Index of the step.
        x: States x_k, (B, *latent).
        prediction: The clean latents and the noise that the policy sees in them.
        gaussian: The policy's own distribution of x_{k+1}.
        condition: B rows.
        seeds: The chains' own, (B,) int64.
    """

    k: int
    x: Tensor
    prediction: Prediction
    gaussian: Gaussian
    condition: Condition
    seeds: Tensor

    def noise(self, number: int) -> Tensor:
        """Standard normal noise besides the chain's own, (B, *latent): of each row's seed, the step and a number."""
        noise = torch.empty(self.x.shape)
        for row, seed in zip(noise, self.seeds.tolist(), strict=True):
            fill_normal(row, stream(seed, FIRST_KEY + number, place=self.k))
        return noise.to(self.x)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What was drawn in a step.

    Attributes:
        state: Where it starts.
        proposal: What was drawn from.
        noise: The rows' own of this step, (B, *latent); not used where the step has none.
        is_noisy: Whether the step has noise; one without ends at the proposal's mean.
        candidates: What was drawn, (B, *latent).
    """

    state: State
    proposal: Gaussian
    noise: Tensor
    is_noisy: bool
    candidates: Tensor

    def of(self, ancestors: Tensor) -> Tensor:
        """What each row draws with its own noise from the proposal of its ancestor, (B, *latent)."""
        mean = self.proposal.mean[ancestors]
        return Gaussian(mean=mean, std=self.proposal.std).sample(self.noise) if self.is_noisy else mean


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The next states of a batch.

    Attributes:
        latents: x_{k+1}, (B, *latent).
        ancestors: Which row's x_k each of them continues, (B,) int64; only rows of equal conditions may change places.
            None where each continues its own.
        outputs: What the network says of x_{k+1} at the next step, where the steering has asked it already.
        then: Steers the next step.
    """

    latents: Tensor
    ancestors: Tensor | None = None
    outputs: "Outputs | None" = None
    then: "Steer"


@dataclass(frozen=True, kw_only=True)
class Weighing:
    """What a steering says of its particles after the last step. G samples, P particles.

    Attributes:
        log_weights: By which one particle of each sample is drawn, (G, P) float64, not normalised.
        log_z: The logarithm of an unbiased estimate of E exp(r / alpha), (G,) float64; None where there is none.
    """

    log_weights: Tensor
    log_z: Tensor | None = None


class Steer:
    """Steers the steps of a rollout; what is not overridden leaves the samples as the policy makes them."""

    def propose(self, state: State, policy: "Policy") -> Gaussian:
        """What x_{k+1} is drawn from, in place of what the policy would draw it from.

        Args:
            state: Where the chains stand.
            policy: On the chain that is sampled.
        """
        return state.gaussian

    def select(self, draw: Draw, policy: "Policy") -> Selection:
        """The next states.

        Args:
            draw: What was drawn.
            policy: On the chain that is sampled.
        """
        return Selection(latents=draw.candidates, then=self)

    def weigh(self, scores: Tensor) -> Weighing:
        """The particles after the last step, of the rewards of their images, (G, P) float64; all alike."""
        return Weighing(log_weights=torch.zeros_like(scores))


def weights_of(policy: "Policy", k: int) -> AbstractContextManager[None]:
    """The weights that make step k: the trained ones, or the pretrained where the schedule says so."""
    is_theirs = k in policy.schedule.pretrained_steps
    return policy.reference(grad=torch.is_grad_enabled()) if is_theirs else nullcontext()
