"""Everything that can be found wrong before weights load: missing rewards, prompts, folders and packages, the plan."""

import importlib.util
import os
from pathlib import Path

import torch

from trainers.config import Config
from trainers.config_errors import ConfigError
from trainers.optimizers import check_optimizer
from trainers.plan import BatchPlan, expected_plan
from trainers.prompts import load_prompts


def preflight(config: Config, *, num_processes: int, with_prompts: bool = True) -> BatchPlan:
    """Checks what a run will need and plans it, with as many stochastic steps as the sampler can have.

    Args:
        config: The run.
        num_processes: Processes that will share it.
        with_prompts: Whether to read the prompts too, which may be a dataset to download.

    Raises:
        ValueError: what is missing, where it was looked for, and the cure.
    """
    check_model(config)
    check_optimizer(config)
    check_rewards(config)
    check_reward_processes(config)
    check_trackers(config)
    check_output(config)
    if with_prompts:
        load_prompts(config.prompts)
        if config.evaluation.prompts is not None:
            load_prompts(config.evaluation.prompts)
    return expected_plan(config, num_processes=num_processes)


def check_model(config: Config) -> None:
    """Refuses a folder that is not there; a hub id (`owner/name`) is only known to be wrong when it is loaded."""
    path = Path(config.model.path).expanduser()
    looks_local = config.model.path.startswith((".", "/", "~")) or config.model.path.count("/") > 1
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ConfigError(f"model.path: {path} is a folder without model_index.json, so no diffusers pipeline")
    if looks_local and not path.is_dir():
        raise ConfigError(f"model.path: there is no folder {path} (looked for {path.absolute()})")


def check_rewards(config: Config) -> None:
    """Finds every reward by name, and the packages it needs, without loading its weights."""
    from rewards.requirements import check_requirements

    for group in ("rewards", "heldout_rewards"):
        for i, term in enumerate(getattr(config, group)):
            try:
                check_requirements(term.name, term.options)
            except (ValueError, ImportError) as error:
                raise ConfigError(f"{group}.{i}.name: {error}") from error
    for term in config.terms[len(config.rewards) :]:
        try:
            check_requirements(term.name, term.options)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"constraints: {error}") from error


def check_reward_processes(config: Config) -> None:
    """Refuses devices that are none, and processes without the packages they need."""
    for device in config.reward_processes.devices:
        try:
            torch.device(device)
        except RuntimeError as error:
            raise ConfigError(f"reward_processes.devices: {device!r} is no torch device like cuda:1 or cpu") from error
    for module in ("starlette", "uvicorn") if config.reward_processes.devices else ():
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"reward_processes.devices: {module} is not installed: pip install 'ddpo[serve]'")


def check_trackers(config: Config) -> None:
    """Refuses a tracker whose package is not installed."""
    for name in config.tracking.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracking.trackers: {name} is not installed: pip install 'ddpo[{name}]', or --tracking.trackers '[]'"
            )


def check_output(config: Config) -> None:
    """Refuses an output folder that cannot be made or written."""
    folder = Path(config.run.output_dir).expanduser().absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise ConfigError(f"run.output_dir: cannot make {folder}: {existing} is a file; choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"run.output_dir: cannot write to {existing}; choose another folder with --run.output_dir")
