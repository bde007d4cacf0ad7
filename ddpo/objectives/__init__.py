"""Objectives: one algorithm per file, each a generator of losses (`ddpo.objectives.base.Objective`)."""

from ddpo.objectives.base import Loss, Objective
from ddpo.objectives.policy_gradient import PolicyGradientConfig, policy_gradient

__all__ = ["Loss", "Objective", "PolicyGradientConfig", "policy_gradient"]
