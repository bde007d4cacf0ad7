"""Steering: what is done to the samples of a policy while they are made, without training it."""

from ddpo.steering.base import Draw, Selection, State, Steer, Value, Weighing
from ddpo.steering.critic_value import critic_value
from ddpo.steering.feynman_kac import FeynmanKac
from ddpo.steering.kinds import BestOfN, FeynmanKacKind, Kind, LangevinKind, RewardGradientKind, SvddKind
from ddpo.steering.langevin import Langevin
from ddpo.steering.reward_gradient import RewardGradient
from ddpo.steering.svdd import Svdd
from ddpo.steering.value import ValueGradient, ValueKind, ValueParticles

__all__ = [
    "BestOfN", "Draw", "FeynmanKac", "FeynmanKacKind", "Kind", "Langevin", "LangevinKind", "RewardGradient",
    "RewardGradientKind", "Selection", "State", "Steer", "Svdd", "SvddKind", "Value", "ValueGradient", "ValueKind",
    "ValueParticles", "Weighing", "critic_value",
]  # fmt: skip
