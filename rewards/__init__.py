"""Scores for images. Knows images, prompts and metadata, not diffusion.

A reward of your own is a function in any file, named in a configuration as `my_file.py:contrast`:

    from rewards import register

    @register(differentiable=True, range=(0, 1))
    def contrast(images, prompts, metadata):
        return images.std(dim=(1, 2, 3))
"""

from rewards.base import RewardError, Scores, UserError
from rewards.card import Card
from rewards.combine.weighted_sum import RewardTerm, WeightedSum
from rewards.description import DescribedReward, Description
from rewards.registry import as_reward, available, register, resolve
from rewards.reward import Reward

__all__ = [
    "Card",
    "DescribedReward",
    "Description",
    "Reward",
    "RewardError",
    "RewardTerm",
    "Scores",
    "UserError",
    "WeightedSum",
    "as_reward",
    "available",
    "register",
    "resolve",
]
