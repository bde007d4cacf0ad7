"""ddpo: reinforcement learning for pretrained diffusion pipelines, with mathematics that can be checked.

The policy and its mathematics live here; rewards in `rewards`, training loops in `trainers`. What needs diffusers is
imported when it is first used: reading a configuration does not, and diffusers takes seconds.
"""

import importlib
from typing import TYPE_CHECKING

from ddpo.gaussian import Gaussian
from ddpo.lora import FullConfig, LoraConfig
from ddpo.rollout import path_kl, rollout, sample_seeds
from ddpo.samplers import SamplerConfig
from ddpo.schedule import Schedule
from ddpo.step_selection import StepSelection
from ddpo.trajectory import Condition, Experience, Trajectory, Transitions

if TYPE_CHECKING:
    from ddpo.policy import Policy
    from ddpo.tracing import UntraceableError

__all__ = [
    "Condition", "Experience", "FullConfig", "Gaussian", "LoraConfig", "Policy", "SamplerConfig", "Schedule",
    "StepSelection", "Trajectory", "Transitions", "UntraceableError", "path_kl", "rollout", "sample_seeds",
]  # fmt: skip

_IMPORTED_WHEN_USED = {"Policy": "ddpo.policy", "UntraceableError": "ddpo.tracing"}


def __getattr__(name: str) -> object:
    """A public name that is not imported yet (PEP 562)."""
    if name not in _IMPORTED_WHEN_USED:
        raise AttributeError(f"module 'ddpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_IMPORTED_WHEN_USED[name]), name)
