"""ddpo: reinforcement learning for pretrained diffusion pipelines, with mathematics that can be checked.

The policy and its mathematics live here; rewards in `rewards`, training loops in `trainers`. What needs diffusers is
imported when it is first used: reading a configuration does not, and diffusers takes seconds.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

from ddpo.objectives.experience import Experience
from ddpo.path_kl import full_noise_kl, path_kl
from ddpo.rollout import recompute, rollout
from ddpo.sampling.gaussian import Gaussian
from ddpo.sampling.prediction import Prediction
from ddpo.sampling.samplers import SamplerConfig
from ddpo.sampling.schedule import Schedule
from ddpo.sampling.step_selection import StepSelection
from ddpo.seeds import sample_seeds
from ddpo.trajectory import Condition, Keep, Samples, Trajectory
from ddpo.weights.adapter import FullConfig, LoraConfig

if TYPE_CHECKING:
    from ddpo.pipeline.tracing import UntraceableError
    from ddpo.policy import Policy

__all__ = [
    "Condition", "Experience", "FullConfig", "Gaussian", "Keep", "LoraConfig", "Policy", "Prediction", "SamplerConfig",
    "Samples", "Schedule", "StepSelection", "Trajectory", "UntraceableError", "full_noise_kl", "path_kl",
    "recompute", "rollout", "sample_seeds",
]  # fmt: skip

_IMPORTED_WHEN_USED = {"Policy": "ddpo.policy", "UntraceableError": "ddpo.pipeline.tracing"}


def __getattr__(name: str) -> object:
    """A public name that is not imported yet, or the installed version (PEP 562)."""
    if name == "__version__":
        return importlib.metadata.version("ddpo")
    if name not in _IMPORTED_WHEN_USED:
        raise AttributeError(f"module 'ddpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_IMPORTED_WHEN_USED[name]), name)
