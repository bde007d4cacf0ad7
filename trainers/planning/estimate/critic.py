"""What a critic adds to a run: weights, and the cost of valuing and fitting a state, counted on the meta device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ddpo.credit.critic import Critic, CriticShape, prompt_sizes
from trainers.config import Config
from trainers.planning.estimate.accounting import Cost, account

FLOAT32 = 4
COPIES = 4  # weights, gradients and AdamW's two averages


@dataclass(frozen=True, kw_only=True)
class CriticCost:
    """A critic's.

    Attributes:
        kept: Bytes of weights, gradients and averages.
        value: Of a state's value.
        fit: Of a state's forward and backward pass.
        features: Numbers that are kept of a step besides its latents.
    """

    kept: int
    value: Cost
    fit: Cost
    features: int = 0


def critic_cost(config: Config, *, state: Sequence[int], prompt: Sequence[Sequence[int]]) -> CriticCost:
    """The cost of the critic that a configuration asks for; nothing where it asks for none.

    Args:
        config: The run.
        state: Shape of what it sees of a sample's step.
        prompt: Shapes of the tensors of a prompt, without the batch.
    """
    if not config.critic.is_on:
        return CriticCost(kept=0, value=Cost(peak=0, flops=0), fit=Cost(peak=0, flops=0))
    with torch.device("meta"):
        shape = CriticShape(
            heads=(*(term.shown for term in config.terms), *(["kl"] if config.weighs_kl else [])),
            num_steps=config.sampler.num_steps,
            state=tuple(state),
            prompt_size=prompt_sizes(prompt),
            width=config.critic.width,
        )
        critic = Critic(shape)
        k, x, text = torch.zeros(1, dtype=torch.int64), torch.empty(1, *shape.state), torch.empty(1, shape.prompt_size)
        targets = torch.empty(1, len(shape.heads))
    for parameter in critic.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    grads = [parameter.grad for parameter in critic.parameters() if parameter.grad is not None]
    ignored = [*critic.parameters(), *grads, k, x, text, targets]

    def fit() -> None:
        torch.autograd.backward(critic.loss(k, x, text, targets).mean())

    return CriticCost(
        kept=COPIES * FLOAT32 * sum(parameter.numel() for parameter in critic.parameters()),
        value=account(torch.no_grad()(lambda: critic(k, x, text)), ignored=ignored),
        fit=account(fit, ignored=ignored),
        features=shape.state[0] if config.critic.kind == "features" else 0,
    )
