"""Runs started from Python: what their objects mean for the configuration, and what no configuration can say of them.

A policy, rewards and prompts are handed over as objects. What they were made from goes into the run's configuration;
those that no command can make again are named in `objects.json`, and the commands refuse such a run.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from importlib.metadata import entry_points
from pathlib import Path

from ddpo import Policy
from rewards import RewardTerm, WeightedSum
from rewards.registry import BUILT_IN, ENTRY_POINT_GROUP
from trainers.config import Config
from trainers.config_errors import ConfigError, show
from trainers.config_io import load_config, resume_overrides
from trainers.prompts import Prompt, PromptError, load_prompts
from trainers.run import CONFIG, RunError, RunFolder

OBJECTS = "objects.json"

PROMPTS = "prompts"
OWN_PROMPTS = "given to train()"  # in place of a prompt source


def as_prompts(prompts: Sequence[str] | Sequence[Prompt]) -> list[Prompt]:
    """Prompts given as texts or with metadata.

    Raises:
        PromptError: They are something else.
    """
    if isinstance(prompts, str):
        raise PromptError(f"prompts must be a list of texts, got the text {prompts!r}; write [{prompts!r}]")
    wrong = next((prompt for prompt in prompts if not isinstance(prompt, str | Prompt)), None)
    if wrong is not None:
        raise PromptError(
            f"prompts must be texts or trainers.prompts.Prompt(text=..., metadata=...), got {type(wrong).__name__}: "
            f"{wrong!r}"
        )
    return [prompt if isinstance(prompt, Prompt) else Prompt(text=prompt) for prompt in prompts]


def with_policy(config: Config, policy: Policy) -> Config:
    """The configuration with sampler, adapter, precision and source of a policy.

    Raises:
        ConfigError: A key of the configuration is neither the default nor what the policy was made with.
    """
    source = policy.source
    loaded = {} if source is None else asdict(source)
    model = {"precision": policy.denoiser.precision, "offload": policy.offload, **loaded}
    pairs = {f"model.{key}": (getattr(config.model, key), value) for key, value in model.items()}
    pairs |= {
        f"sampler.{field.name}": (getattr(config.sampler, field.name), getattr(policy.sampler, field.name))
        for field in fields(policy.sampler)
    }
    if policy.adapter is not None:
        pairs["adapter"] = (config.adapter, policy.adapter)
    for key, (told, real) in pairs.items():
        if told not in (real, _default(key)):
            raise ConfigError(f"{key} is {show(told)}, but the policy was made with {show(real)}; make them equal")
    if source is None and config.model.path == _default("model.path"):
        model["path"] = f"{type(policy.pipeline).__name__} made in Python"
    return replace(
        config,
        model=replace(config.model, **model),
        sampler=policy.sampler,
        adapter=policy.adapter or config.adapter,
    )


def read_prompts(config: Config, prompts: Sequence[str] | Sequence[Prompt] | None) -> tuple[Config, list[Prompt]]:
    """The prompts that are given, else the configuration's; and the configuration that says which they are.

    Raises:
        PromptError: They cannot be used.
    """
    if prompts is not None:
        return replace(config, prompts=replace(config.prompts, source=OWN_PROMPTS)), as_prompts(prompts)
    if config.prompts.source == OWN_PROMPTS:
        raise PromptError("the prompts of this run were given to train(); give them again")
    return config, load_prompts(config.prompts)


def as_saved(config: Config, run: RunFolder) -> Config:
    """A configuration to resume with, under the run's own name.

    Raises:
        ConfigError: It changes what must not change in a run.
    """
    saved = load_config(run.path / CONFIG)
    resume_overrides(saved, config, saved_file=run.path / CONFIG)
    return replace(config, run=saved.run)


def _default(key: str) -> object:
    value: object = Config()
    for part in key.split("."):
        value = getattr(value, part)
    return value


# ---- what a command cannot make again --------------------------------------------------------------------------------


def objects_of(config: Config, policy: Policy, reward: WeightedSum, heldout: WeightedSum | None) -> list[str]:
    """What of a run no command can make again.

    Args:
        config: The run's.
        policy: At its pretrained weights.
        reward: What is optimised.
        heldout: What is only measured; None for none.
    """
    found = ["a pipeline"] if policy.source is None or type(policy) is not Policy else []
    for total in (reward,) if heldout is None else (reward, heldout):
        found += [f"the reward {term.name!r}" for term in total.terms if not (total.by_name and _is_installed(term))]
    return [*found, *([PROMPTS] if config.prompts.source == OWN_PROMPTS else [])]


def _is_installed(term: RewardTerm) -> bool:
    """Whether a name means the same in another process, unlike one that this program has registered."""
    return ":" in term.name or term.name in BUILT_IN or term.name in entry_points(group=ENTRY_POINT_GROUP).names


def record_objects(run: Path, objects: Sequence[str]) -> None:
    """Writes `objects.json`, on the main process."""
    (run / OBJECTS).write_text(json.dumps(list(objects)) + "\n")


def refuse_objects(run: Path, *, only: str | None = None) -> None:
    """Refuses to look at or to continue a run by a command that cannot make its objects again.

    Args:
        run: The run folder.
        only: The single kind of object that the command needs; None for all.

    Raises:
        RunError: Names them, and the call in Python.
    """
    file = run / OBJECTS
    objects = json.loads(file.read_text()) if file.is_file() else []
    if only is not None:
        objects = [name for name in objects if name == only]
    if objects:
        raise RunError(
            f"{run} was started from Python with {', '.join(objects)} of its own, which a command cannot make again; "
            f"continue it with trainers.loop.train(..., resume={str(run)!r}), which also evaluates it; its weights are "
            f"in {run / 'lora'}"
        )
