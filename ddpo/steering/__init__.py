"""Steering: what is done to the samples of a policy while they are made, without training it."""

from ddpo.steering.base import Draw, Selection, State, Steer, Unsteered
from ddpo.steering.feynman_kac import FeynmanKac
from ddpo.steering.kinds import BestOfN, FeynmanKacKind, Kind, RewardGradientKind, SvddKind
from ddpo.steering.reward_gradient import RewardGradient
from ddpo.steering.svdd import Svdd

__all__ = [
    "BestOfN", "Draw", "FeynmanKac", "FeynmanKacKind", "Kind", "RewardGradient", "RewardGradientKind", "Selection",
    "State", "Steer", "Svdd", "SvddKind", "Unsteered",
]  # fmt: skip
