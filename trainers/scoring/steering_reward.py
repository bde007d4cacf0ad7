"""A run's rewards as steering asks for them: of predicted images on the way as of finished ones."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ddpo.credit.lagrangian import Constraint
from ddpo.steered import Bounds, RewardOf
from ddpo.steering import Kind
from ddpo.validation import UserError
from rewards import RewardTerm, WeightedSum


def steering_reward(reward: WeightedSum, *, epoch: Callable[[], int]) -> RewardOf:
    """The total at the present scales, with its graph where the images have one.

    Args:
        reward: What is steered by.
        epoch: Finished epochs, which set scheduled weights.
    """

    def total(images: Tensor, prompts: list[str], metadata: list[Mapping[str, object]]) -> Tensor:
        return reward(images, prompts, metadata, epoch=epoch(), gradient=images.requires_grad).total

    return total


def steering_bounds(
    constraints: Sequence[Constraint], terms: Sequence[RewardTerm], *, device: torch.device
) -> tuple[Bounds, WeightedSum]:
    """Bounds on steered samples, and the rewards that score what is bounded, which nothing else asks on the way.

    Args:
        constraints: At least one.
        terms: All rewards, those that only constraints name included.
        device: Where networks of rewards run.
    """
    names = [one.reward for one in constraints]
    wanted = {part for name in names for part in (name, name.partition("/")[0])}
    measured = WeightedSum([term for term in terms if wanted & set(term.aliases)], device=device)

    def scores(images: Tensor, prompts: list[str], metadata: list[Mapping[str, object]]) -> dict[str, Tensor]:
        components = measured.components(images, prompts, metadata)
        keys = {name: measured.component_of(name) for name in names}
        return components | {name: components[key] for name, key in keys.items() if key in components}

    return Bounds(constraints=constraints, scores=scores), measured


def check_steering_reward(steer: Kind, reward: WeightedSum) -> None:
    """Refuses rewards that compare images, which are steered one by one, or lack the gradient that is needed.

    Raises:
        UserError: One does.
    """
    if reward.groupwise:
        compared = ", ".join(one.name for one in reward.rewards if one.groupwise)
        raise UserError(f"{compared} compares images with each other, which are steered one by one; name other rewards")
    if steer.needs_gradient and reward.without_gradient:
        raise UserError(
            f"{', '.join(reward.without_gradient)} has no gradient by its images, which {steer.kind} needs; steer by "
            "best_of_n, feynman_kac or svdd, or name a reward that has one (ddpo rewards list)"
        )
