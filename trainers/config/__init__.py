"""What a user may configure: groups of keys, YAML, overrides, errors that name the nearest key."""

from trainers.config.config import Config
from trainers.config.groups import (
    BatchConfig,
    CheckpointConfig,
    DistributedConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    RewardProcessConfig,
    RunConfig,
    ShapingConfig,
    TrackingConfig,
)

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DistributedConfig",
    "EvaluationConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RewardProcessConfig",
    "RunConfig",
    "ShapingConfig",
    "TrackingConfig",
]
