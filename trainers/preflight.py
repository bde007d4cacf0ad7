"""Everything that can be found wrong before weights load: missing rewards, prompts, folders and packages, the plan."""

import importlib.util
from pathlib import Path

import torch

from rewards import RewardTerm
from rewards.combine import check_reported
from rewards.registry import find
from rewards.requirements import check_requirements, reported_name
from trainers.config import Config
from trainers.config_errors import ConfigError
from trainers.optimizers import check_optimizer
from trainers.outputs import check_folder
from trainers.plan import BatchPlan, check_whole_groups, expected_plan
from trainers.prompts import load_prompts


def preflight(config: Config, *, num_processes: int, here: bool = True, resumed: Path | None = None) -> BatchPlan:
    """Checks what a run will need and plans it, as far as it can be planned before the pipeline is loaded.

    Args:
        config: The run.
        num_processes: Processes that will share it.
        here: Whether it will run here and now: then its device must be there, and the prompts are read, which may be a
            dataset to download.
        resumed: The run folder that it continues; None for a new one in `run.output_dir`.

    Raises:
        ValueError: what is missing, where it was looked for, and the cure.
    """
    check_model(config)
    check_device(config, here=here and num_processes == 1)  # several processes each have a device of their own
    check_optimizer(config)
    check_rewards(config)
    check_heldout(config)
    check_reward_processes(config)
    check_trackers(config)
    if resumed is None:
        check_folder("run.output_dir", config.run.folder)
    else:
        check_folder("--resume", resumed)
    if here:
        load_prompts(config.prompts)
        if config.evaluation.prompts is not None:
            load_prompts(config.evaluation.prompts)
    plan = expected_plan(config, num_processes=num_processes)
    if any(find(term.name).groupwise for term in config.terms):  # others only know it once they are made
        check_whole_groups(plan)
    return plan


def check_model(config: Config) -> None:
    """Refuses a folder that is not there; a hub id (`owner/name`) is only known to be wrong when it is loaded."""
    path = Path(config.model.path).expanduser()
    looks_local = config.model.path.startswith((".", "/", "~")) or config.model.path.count("/") > 1
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ConfigError(f"model.path: {path} is a folder without model_index.json, so no diffusers pipeline")
    if looks_local and not path.is_dir():
        raise ConfigError(f"model.path: there is no folder {path} (looked for {path.absolute()})")


def check_device(config: Config, *, here: bool) -> None:
    """Refuses a device that is none, or if the run is to be `here`, one that this machine has not."""
    if config.model.device is None:
        return
    device = _device("model.device", config.model.device)
    if device.type == "mps":
        raise ConfigError("model.device: mps has no float64, which log-probabilities need; use cpu")
    if not here or device.type == "cpu":
        return
    own = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if own is not None and own.type == device.type else 0
    if (device.index or 0) >= count:
        has = ", ".join(f"{device.type}:{index}" for index in range(count)) or f"no {device.type} device"
        raise ConfigError(f"model.device: there is no {config.model.device} here (this machine has {has}, and cpu)")


def _device(key: str, name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{key}: {name!r} is no torch device like cuda:1 or cpu") from error


def check_heldout(config: Config) -> None:
    """Refuses to stop on over-optimisation where nothing is held out that could show it."""
    if config.evaluation.stop_on_overoptimisation and not config.heldout_rewards:
        raise ConfigError(
            "evaluation.stop_on_overoptimisation: must be false without heldout_rewards, which show over-optimisation"
        )


def check_rewards(config: Config) -> None:
    """Finds every reward by name, its options and the packages it needs, without loading its weights."""
    for group in ("rewards", "heldout_rewards"):
        for i, term in enumerate(getattr(config, group)):
            _check_reward(term, f"{group}.{i}.name")
    for term in config.terms[len(config.rewards) :]:
        _check_reward(term, "constraints")
    for group, terms in (("rewards", config.terms), ("heldout_rewards", config.heldout_rewards)):
        try:
            check_reported([(_reported(term), term.name) for term in terms])
        except ValueError as error:
            raise ConfigError(f"{group}: {error}") from error


def _check_reward(term: RewardTerm, key: str) -> None:
    try:
        check_requirements(term.name, term.options)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{key}: {error}") from error


def _reported(term: RewardTerm) -> str:
    return term.label or reported_name(term.name, term.options)


def check_reward_processes(config: Config) -> None:
    """Refuses devices that are none, processes without the packages they need, and two rewards of one name in them."""
    for device in config.reward_processes.devices:
        _device("reward_processes.devices", device)
    for module in ("starlette", "uvicorn") if config.reward_processes.devices else ():
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"reward_processes.devices: {module} is not installed: pip install 'ddpo[serve]'")
    served: dict[str, RewardTerm] = {}
    for term in (*config.terms, *config.heldout_rewards) if config.reward_processes.devices else ():
        other = served.setdefault(_reported(term), term)
        if (other.name, other.options) != (term.name, term.options):
            raise ConfigError(
                f"reward_processes: {other.shown} and {term.shown} would both be served as {_reported(term)!r}, with "
                f"other options; give one of them a label"
            )


def check_trackers(config: Config) -> None:
    """Refuses a tracker whose package is not installed."""
    for name in config.tracking.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracking.trackers: {name} is not installed: pip install 'ddpo[{name}]', or --tracking.trackers '[]'"
            )
