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
from ddpo.sampling.prediction import Prediction
from ddpo.sampling.schedule import coefficient
from ddpo.steering.base import Score, State, Steer
from ddpo.trajectory import Condition
from ddpo.validation import UserError

if TYPE_CHECKING:  # the policy loads diffusers
    from ddpo.policy import Policy

Through = Literal["network", "image"]


@dataclass(frozen=True, kw_only=True)
class RewardGradient(Steer):
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

    @torch.enable_grad()
    def _gradient(self, state: State, policy: "Policy") -> Tensor:
        """Of r(x0_hat(x_k)) by x_k, (B, *latent)."""
        if self.through == "network":
            return slope(self.score, policy, state.k, state.x, state.condition)[1]
        leaf = state.prediction.x0.detach().requires_grad_()
        return _derivative(self.score, policy, leaf, by=leaf) / coefficient(policy.schedule.a, state.k, leaf)


@torch.enable_grad()
def slope(score: Score, policy: "Policy", k: int, x: Tensor, condition: Condition) -> tuple[Prediction, Tensor]:
    """What the policy sees in states at step k, and the gradient of the reward of what it sees by the states.

    Args:
        score: r, with a gradient.
        policy: On the chain that is sampled.
        k: The step.
        x: The states, (B, *latent).
        condition: B rows.

    Returns:
        The prediction, without a graph, and grad_x r(x0_hat(x)), (B, *latent).

    Raises:
        UserError: The reward has no gradient.
    """
    leaf = x.detach().requires_grad_()
    seen = policy.predict(k, leaf, condition)
    gradient = _derivative(score, policy, seen.x0, by=leaf)
    return Prediction(x0=seen.x0.detach(), eps=seen.eps.detach()), gradient


def _derivative(score: Score, policy: "Policy", clean: Tensor, *, by: Tensor) -> Tensor:
    """Of the rewards of clean latents (B, *latent) by what they were made of."""
    scores = score(policy.decode(clean, with_gradient=True), torch.arange(len(clean)))
    if not scores.requires_grad:
        raise UserError(
            "the reward has no gradient by its images: steer with best_of_n, feynman_kac or svdd, or by a reward "
            "that is differentiable"
        )
    (gradient,) = torch.autograd.grad(scores.sum(), by)
    return gradient
