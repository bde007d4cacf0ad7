"""Guidance by the gradient of a reward of the predicted image (Chung et al., arXiv:2209.14687; arXiv:2302.07121).

    mean_k + std_k^2 grad_x r(x0_hat(x_k)) / alpha

through the network, or with the predicted noise held: x0_hat = (x - s eps_hat) / a, grad_x = grad_x0 / a. It is the
first-order control of the tilted law with r(x0_hat) in the place of the value, hence exact for none; no step without
noise is moved.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ddpo.sampling.gaussian import Gaussian
from ddpo.sampling.schedule import coefficient
from ddpo.steering.base import Draw, Selection, State
from ddpo.steering.feynman_kac import Score
from ddpo.validation import UserError

if TYPE_CHECKING:  # the policy loads diffusers
    from ddpo.policy import Policy

Through = Literal["network", "image"]


@dataclass(frozen=True, kw_only=True)
class RewardGradient:
    """Shifts the means of noisy steps; see the module docstring.

    Attributes:
        score: r, with a gradient.
        alpha: Reward units per nat.
        through: What the gradient goes through.
    """

    score: Score
    alpha: float
    through: Through = "network"

    def propose(self, state: State, policy: "Policy") -> Gaussian:
        """The policy's distribution with its mean shifted."""
        own = state.gaussian
        if state.k not in policy.schedule.stochastic_steps:
            return own
        return replace(own, mean=own.mean + own.std**2 * self._gradient(state, policy) / self.alpha)

    def select(self, draw: Draw, policy: "Policy") -> Selection:
        """The candidates."""
        return Selection(latents=draw.candidates, then=self)

    @torch.enable_grad()
    def _gradient(self, state: State, policy: "Policy") -> Tensor:
        """Of r(x0_hat(x_k)) by x_k, (B, *latent)."""
        if self.through == "network":
            leaf = state.x.detach().requires_grad_()
            x0, scale = policy.predict(state.k, leaf, state.condition).x0, None
        else:
            leaf = x0 = state.prediction.x0.detach().requires_grad_()
            scale = coefficient(policy.schedule.a, state.k, leaf)
        scores = self.score(policy.decode(x0, with_gradient=True), torch.arange(len(leaf)))
        if not scores.requires_grad:
            raise UserError(
                "the reward has no gradient by its images: steer with best_of_n, feynman_kac or svdd, or by a reward "
                "that is differentiable"
            )
        (gradient,) = torch.autograd.grad(scores.sum(), leaf)
        return gradient if scale is None else gradient / scale
