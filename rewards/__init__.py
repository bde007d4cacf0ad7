"""Scores for images. Knows images, prompts and metadata, not diffusion.

A reward of your own is a function in any file, named in a configuration as `my_file.py:contrast`:

    from rewards import register

    @register(differentiable=True, range=(0, 1))
    def contrast(images, prompts, metadata):
        return images.std(dim=(1, 2, 3))
"""

from rewards.base import Reward, RewardError, Scores
from rewards.card import Card
from rewards.combine import RewardTerm, WeightedSum
from rewards.registry import as_reward, available, register, resolve

__all__ = [
    "Card",
    "Reward",
    "RewardError",
    "RewardTerm",
    "Scores",
    "WeightedSum",
    "as_reward",
    "available",
    "register",
    "resolve",
]
