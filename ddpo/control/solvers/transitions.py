"""Sampled transitions, all that a model-free method sees of a problem.

    x' = x + f(x, a) dt + Sigma(x, a) dW,     r = r(x, a) per unit of time,     the action held over the step

These are steps of the Euler chain, so a method that solves the chain exactly has the chain's optimum, not the
diffusion's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpo.control.problems.problem import ControlProblem

Sampler = Callable[[int, torch.Generator], Tensor]
"""Draws (B, k) states or actions."""


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """B transitions.

    Attributes:
        state: x, (B, n).
        action: a, (B, m).
        reward: r, (B,), per unit of time.
        next_state: x', (B, n).
        dt: Step, in units of time.
    """

    state: Tensor
    action: Tensor
    reward: Tensor
    next_state: Tensor
    dt: float


def sample_transitions(
    problem: ControlProblem,
    count: int,
    *,
    states: Sampler,
    actions: Sampler,
    dt: float,
    generator: torch.Generator,
) -> Transitions:
    """Draws B = `count` transitions from independent states and actions.

    Raises:
        ValueError: dt is not positive.
    """
    if not dt > 0:
        raise ValueError(f"dt must be positive, got {dt}")
    x, a = states(count, generator), actions(count, generator)
    with torch.no_grad():
        noise = torch.randn(count, problem.noise_dim, 1, generator=generator, dtype=x.dtype)
        push = (problem.diffusion(x, a) @ noise).squeeze(-1) * dt**0.5
        return Transitions(
            state=x,
            action=a,
            reward=problem.reward(x, a),
            next_state=x + problem.drift(x, a) * dt + push,
            dt=dt,
        )
