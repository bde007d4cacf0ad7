"""Objectives: one algorithm per file, with its configuration, its batch and its losses (`ddpo.objectives.base`)."""

from ddpo.objectives.base import Demand, Loss, Models, Objective, ObjectiveConfig
from ddpo.objectives.experience import Experience
from ddpo.objectives.policy_gradient import PolicyGradientConfig

__all__ = ["Demand", "Experience", "Loss", "Models", "Objective", "ObjectiveConfig", "PolicyGradientConfig"]
