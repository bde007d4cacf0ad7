"""How the KL follows its target: the step response of a controller of alpha on the exact chain.

The policy is an affine one on Gaussian data, whose reward and path KL are exact, and so is the gradient that Adam
takes: what remains is the loop of policy and controller, without noise. T steps, d dimensions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ddpo.control.diffusion.chain import Quadratic, marginals, step_kls
from ddpo.control.diffusion.toy_problem import ToyProblem

Controller = Callable[[float, float], float]
"""The next weight, given the present one and the path KL; one of its own for each run, as it may remember."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """A run.

    Attributes:
        kl: Path KL of the policy that samples each epoch, nats.
        alpha: The weight of each epoch, reward units per nat.
    """

    kl: tuple[float, ...]
    alpha: tuple[float, ...]

    def overshoot(self, target: float) -> float:
        """The largest KL over the target."""
        return max(self.kl) / target

    def settled(self, target: float, within: float = 0.1) -> int:
        """Epochs after which the KL stays within this share of the target; all of them if it never does."""
        outside = [epoch for epoch, kl in enumerate(self.kl) if abs(kl / target - 1) > within]
        return outside[-1] + 1 if outside else 0


def respond(
    problem: ToyProblem,
    control: Controller,
    *,
    start: float,
    learning_rate: float,
    epochs: int = 100,
    updates: int = 2,
) -> Response:
    """Trains from the pretrained policy by the exact gradient, the weight following the controller.

    Args:
        problem: The problem; its own alpha is not used.
        control: Of the weight.
        start: The first weight.
        learning_rate: Adam's.
        epochs: How many.
        updates: Optimizer steps an epoch.
    """
    reference = problem.reference
    steps, dims = reference.F.shape[:2]
    gain = torch.zeros(steps, dims, dims, dtype=torch.float64, requires_grad=True)
    shift = torch.zeros(steps, dims, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([gain, shift], lr=learning_rate)
    alpha = start
    kls: list[float] = []
    alphas: list[float] = []
    for _ in range(epochs):
        for update in range(updates):
            chain = problem.chain(gain, shift)
            means, covs = marginals(chain)
            kl = step_kls(chain, reference).sum()
            if update == 0:
                kls.append(float(kl.detach()))
            loss = alpha * kl - problem.reward.expectation(means[-1], covs[-1])
            gain.grad, shift.grad = torch.autograd.grad(loss, (gain, shift))
            optimizer.step()
        alphas.append(alpha)
        alpha = control(alpha, kls[-1])
    return Response(kl=tuple(kls), alpha=tuple(alphas))


def reward_std(problem: ToyProblem) -> float:
    """Standard deviation of the pretrained policy's rewards: sqrt( g' C g + tr(P C P C) / 2 ), g = q - P mean."""
    means, covs = marginals(problem.reference)
    reward: Quadratic = problem.reward
    slope, cov = reward.q - reward.P @ means[-1], covs[-1]
    spread = reward.P @ cov
    return math.sqrt(float(slope @ cov @ slope + 0.5 * (spread @ spread).trace()))
