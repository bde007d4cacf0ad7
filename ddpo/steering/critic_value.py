"""A trained critic as the value that steers: V_k(x) = sum over its heads of a weight times the head.

A critic predicts the mean of what is still to be earned, E[r(x_T) | x_k], under the policy that it was trained beside.
The soft value alpha log E[exp(r / alpha) | x_k] tends to it as alpha grows, and is never below it (Jensen).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpo.credit.critic import Critic, pooled_prompt
from ddpo.steering.base import Value
from ddpo.trajectory import Condition
from ddpo.validation import UserError

if TYPE_CHECKING:  # the policy loads diffusers
    from ddpo.policy import Policy


def critic_value(critic: Critic, policy: "Policy", weights: Mapping[str, float]) -> Value:
    """A value of a critic on latents (`critic.kind: network`).

    Args:
        critic: Such as `Critic.read(RUN/lora)`; goes to the policy's device.
        policy: What is to be steered.
        weights: Of its heads by name, reward units per unit of the score; the others count 0.

    Returns:
        V(k, x, condition), (B,) float32, with a gradient by x, of steps before the last one has been taken.

    Raises:
        UserError: The critic is of another model, or has no such head.
    """
    shape, schedule = critic.shape, policy.schedule
    if shape.state != policy.latent_shape or shape.num_steps != schedule.num_steps:
        raise UserError(
            f"the critic is of another model or chain: it takes states {shape.state} of {shape.num_steps} steps, the "
            f"policy has {policy.latent_shape} of {schedule.num_steps}; give the critic of a run with "
            "critic.kind: network on this model, and its sampler.num_steps"
        )
    if missing := sorted(set(weights) - set(shape.heads)):
        raise UserError(f"the critic has no {missing[0]!r}, only {', '.join(shape.heads)}")
    critic = critic.to(policy.device).requires_grad_(False).eval()
    factors = torch.tensor([weights.get(name, 0.0) for name in shape.heads], device=policy.device)

    def value(k: int, x: Tensor, condition: Condition) -> Tensor:
        assert k < shape.num_steps, "nothing is still to come after the last step"
        prompt = pooled_prompt(condition, len(x)).to(x.device)
        if prompt.shape[1] != shape.prompt_size:
            raise UserError(
                f"the critic is of another model: it takes prompts of {shape.prompt_size} numbers, this model gives "
                f"{prompt.shape[1]}"
            )
        return critic(torch.full((len(x),), k, device=x.device), x.float(), prompt) @ factors

    return value
