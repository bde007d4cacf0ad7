"""Everything that can be found wrong before weights load: missing rewards, prompts, folders and packages, the plan."""

import importlib.util
import inspect
from pathlib import Path

import torch

from ddpo.pipeline.input_images import check_image
from ddpo.pipeline.unloadable import check_single_file, check_weights
from ddpo.validation import UserError as PictureError
from ddpo.validation import within
from rewards import RewardTerm
from rewards.base import UserError
from rewards.combine.weighted_sum import check_reported
from rewards.description import DescribedReward
from rewards.registry import find
from rewards.requirements import check_requirements, reported_name
from trainers.config import Config
from trainers.config.errors import ConfigError
from trainers.offline.captioned import read_captioned
from trainers.offline.read import images_of, load_judged
from trainers.planning.architectures import INDEX, read_classes
from trainers.planning.plan import BatchPlan, check_judged, check_whole_groups, expected_plan
from trainers.prompts import load_prompts
from trainers.run_folder.writable import check_folder
from trainers.tracking.tracker import PACKAGED


def preflight(config: Config, *, num_processes: int, here: bool = True, resumed: Path | None = None) -> BatchPlan:
    """Checks what a run will need and plans it, as far as it can be planned before the pipeline is loaded.

    Args:
        config: The run.
        num_processes: Processes that will share it.
        here: Whether it starts here and now: then its device must exist, and its prompts are read, which may download
            a dataset.
        resumed: The run folder that it continues; None for a new one in `run.output_dir`.

    Raises:
        UserError: Something is missing or does not fit; the message says where it was looked for, and the cure.
    """
    check_model(config, resumed=resumed is not None)
    check_init(config)
    check_device(config, here=here and num_processes == 1)  # several processes each have a device of their own
    check_optimizer(config)
    check_rewards(config)
    check_heldout(config)
    check_reward_gradient(config)
    check_reward_processes(config)
    check_trackers(config)
    check_spread(config)
    check_regularization(config)
    if resumed is None:
        check_folder("run.output_dir", config.run.folder)
    else:
        check_folder("--resume", resumed)
    if here:
        judged = None if config.offline is None else load_judged(config.offline)
        load_prompts(config.prompts)
        if config.evaluation.prompts is not None:
            load_prompts(config.evaluation.prompts)
    plan = expected_plan(config, num_processes=num_processes)
    if here and judged is not None:
        check_judged(plan, len(images_of(judged[0])))
    if any(find(term.name).groupwise for term in config.terms):  # others only know it once they are made
        check_whole_groups(plan)
    if config.demand.whole_groups:
        check_whole_groups(plan, who="an objective", alone=True)
    return plan


def check_model(config: Config, *, resumed: bool = False) -> None:
    """Refuses a folder that does not exist; whether a hub id (`owner/name`) exists shows only when it is loaded."""
    path = Path(config.model.path).expanduser()
    looks_local = config.model.path.startswith((".", "/", "~")) or config.model.path.count("/") > 1
    model = config.model
    with within("model"):
        check_single_file(
            path, config=model.config, revision=model.revision, variant=model.variant, quantization=model.quantization
        )
        if (path / INDEX).is_file():
            check_weights(path, variant=model.variant)
    if path.is_file():
        _check_config_folder(model.config)
        return
    if path.is_dir() and not (path / INDEX).is_file():
        raise ConfigError(f"model.path: {path} is a folder without model_index.json, so no diffusers pipeline")
    if path.is_dir() and not read_classes(path):
        raise ConfigError(f"model.path: {path / INDEX} names no parts of a diffusers pipeline; save the pipeline again")
    if looks_local and not path.is_dir():
        moved = "; name where it is now with --model.path" if resumed else ""
        raise ConfigError(f"model.path: there is no folder {path} (looked for {path.absolute()}){moved}")


def _check_config_folder(place: str | None) -> None:
    """Refuses a folder that a single file's settings are to come from and that has none."""
    if place is not None and place.startswith((".", "/", "~")) and not (Path(place).expanduser() / INDEX).is_file():
        raise ConfigError(f"model.config: there is no {INDEX} in {Path(place).expanduser().absolute()}")


def check_init(config: Config) -> None:
    """Refuses a LoRA to begin from that is named as a file or folder and is not there."""
    place = config.init
    if place is None:
        return
    path = Path(place).expanduser()
    looks_local = place.startswith((".", "/", "~")) or place.count("/") != 1 or path.suffix == ".safetensors"
    if looks_local and not path.exists():
        raise ConfigError(f"adapter.init: there is no {path} (looked for {path.absolute()})")


def check_device(config: Config, *, here: bool) -> None:
    """Refuses a name that torch does not know and, for a run that starts `here`, a device that this machine lacks."""
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


def check_optimizer(config: Config) -> None:
    """Refuses 8-bit averages without bitsandbytes.

    Raises:
        ConfigError: The package is missing; the message names the extra.
    """
    if config.optimizer.eight_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "optimizer.eight_bit needs bitsandbytes: pip install 'ddpo[bitsandbytes]', or --optimizer.eight_bit false"
        )


def check_heldout(config: Config) -> None:
    """Refuses to stop on over-optimisation without held-out rewards, which alone can show it."""
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
        except UserError as error:
            raise ConfigError(f"{group}: {error}") from error


def _check_reward(term: RewardTerm, key: str) -> None:
    try:
        check_requirements(term.name, term.options)
    except UserError as error:
        raise ConfigError(f"{key}: {error}") from error


def _reported(term: RewardTerm) -> str:
    return term.label or reported_name(term.name, term.options)


def check_reward_gradient(config: Config) -> None:
    """Where the objective differentiates rewards, refuses those without derivatives, or that run elsewhere."""
    if not config.demand.reward_gradient:
        return
    because = f"with the objective {config.demand.name}, which learns through their gradient"
    if config.reward_processes.devices:
        raise ConfigError(
            f"reward_processes.devices: must be [] {because}, got {list(config.reward_processes.devices)}"
        )
    weighed = [(term, find(term.name)) for term in config.terms if term.weight]
    if any(noted.groupwise for _, noted in weighed):
        compared = ", ".join(term.shown for term, noted in weighed if noted.groupwise)
        raise ConfigError(f"rewards: {compared} must compare no images {because}, of one image at a time; leave it out")
    plain = [term.shown for term, noted in weighed if not (noted.differentiable or _says_itself(noted.target))]
    if config.demand.chain_unit and plain:
        raise ConfigError(
            f"rewards: {', '.join(plain)} must be differentiable with objective.noise_free_steps: pathwise, which adds "
            "the derivative of the whole total; leave it out, or set noise_free_steps: ignored"
        )
    if not any(noted.differentiable or _says_itself(noted.target) for _, noted in weighed):
        names = ", ".join(term.shown for term, _ in weighed)
        raise ConfigError(f"rewards: {names} must be differentiable {because}; add one that is, or choose another kind")


def _says_itself(target: object) -> bool:
    """Whether objects of a reward class say what they are once they are made."""
    return inspect.isclass(target) and issubclass(target, DescribedReward)


def check_reward_processes(config: Config) -> None:
    """Refuses unknown devices, missing packages, and two different rewards that would be served under one name."""
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


def check_spread(config: Config) -> None:
    """Refuses an embedding for evaluations that is unknown, or whose packages are missing."""
    if config.evaluation.spread is None:
        return
    try:
        check_requirements("diversity", {"embedding": config.evaluation.spread})
    except UserError as error:
        raise ConfigError(f"evaluation.spread: {error}") from error


def check_regularization(config: Config) -> None:
    """Refuses a folder for the denoising loss that is missing, has no image, or one without a caption."""
    folder = config.regularization.denoising.images
    if folder is None:
        return
    try:
        entries = read_captioned(folder)
        for image, _ in entries:
            check_image(image)
    except PictureError as error:
        raise ConfigError(f"regularization.denoising.images: {error}") from error


def check_trackers(config: Config) -> None:
    """Refuses a tracker whose package is not installed."""
    for name in config.tracking.trackers:
        if name in PACKAGED and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracking.trackers: {name} is not installed: pip install 'ddpo[{name}]', or --tracking.trackers '[]'"
            )
