"""ddpo: reinforcement learning for pretrained diffusion pipelines, with mathematics that can be checked.

The policy and its mathematics live here; rewards in `rewards`, training loops in `trainers`.
"""

from ddpo.gaussian import Gaussian
from ddpo.lora import FullConfig, LoraConfig
from ddpo.policy import Policy
from ddpo.rollout import path_kl, rollout, sample_seeds
from ddpo.samplers import SamplerConfig
from ddpo.schedule import Schedule
from ddpo.step_selection import StepSelection
from ddpo.tracing import UntraceableError
from ddpo.trajectory import Condition, Experience, Trajectory, Transitions

__all__ = [
    "Condition", "Experience", "FullConfig", "Gaussian", "LoraConfig", "Policy", "SamplerConfig", "Schedule",
    "StepSelection", "Trajectory", "Transitions", "UntraceableError", "path_kl", "rollout", "sample_seeds",
]  # fmt: skip
