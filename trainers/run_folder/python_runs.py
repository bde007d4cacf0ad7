"""Runs started from Python: what their objects mean for the configuration, and what no configuration can say of them.

A policy, rewards and prompts are handed over as objects. What they were made from goes into the run's configuration;
those that no command can make again are named in `objects.json`. Prompts go into `prompts.jsonl` as far as JSON can
hold them. Commands that look back at a run do without its rewards; to train on, they refuse it.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, fields, replace
from importlib.metadata import entry_points
from operator import attrgetter
from pathlib import Path

from ddpo import Policy
from rewards import RewardTerm, WeightedSum
from rewards.registry import BUILT_IN, ENTRY_POINT_GROUP
from trainers.config import Config
from trainers.config.errors import ConfigError, show
from trainers.config.resumed import resume_overrides
from trainers.prompts import Prompt, PromptError, as_list, load_prompts, to_prompt
from trainers.run_folder import ledger
from trainers.run_folder.folder import RunError, RunFolder
from trainers.run_folder.records import read_record, refuse, write_record

OBJECTS = "objects.json"
OWN_PROMPTS_FILE = "prompts.jsonl"

PIPELINE = "a pipeline"

PROMPTS = "prompts"
OWN_PROMPTS = "given to train()"  # in place of a prompt source


def as_prompts(prompts: object) -> list[Prompt]:
    """Prompts given as texts, mappings as of a file, or `Prompt`s.

    Raises:
        PromptError: They are something else.
    """
    if isinstance(prompts, str):
        raise PromptError(f"prompts must be a list of texts, got the text {prompts!r}; write [{prompts!r}]")
    given = as_list(prompts, "prompts must be")
    return [
        prompt if isinstance(prompt, Prompt) else to_prompt(prompt, where=f"prompts: entry {number}")
        for number, prompt in enumerate(given)
    ]


def with_policy(config: Config, policy: Policy, *, moved: bool = False) -> Config:
    """The configuration with sampler, adapter, precision and source of a policy.

    Args:
        config: What is wanted.
        policy: What is there.
        moved: Whether the policy's files may lie elsewhere than the configuration says; hashes tell whether they are
            the same.

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
    for key in ("model.path", "model.revision", "model.config") if moved else ():
        pairs.pop(key, None)
    default = Config()
    for key, (told, real) in pairs.items():
        if told not in (real, attrgetter(key)(default)):
            raise ConfigError(f"{key} is {show(told)}, but the policy was made with {show(real)}; make them equal")
    if source is None and config.model.path == default.model.path:
        model["path"] = f"{type(policy.pipeline).__name__} made in Python"
    return replace(
        config,
        model=replace(config.model, **model),
        sampler=policy.sampler,
        adapter=policy.adapter or config.adapter,
    )


def read_prompts(config: Config, prompts: Sequence[str] | Sequence[Prompt] | None) -> tuple[Config, list[Prompt]]:
    """The configuration, which says where prompts come from, and the prompts: those given, else the configuration's.

    Raises:
        PromptError: They cannot be used.
    """
    if prompts is not None:
        return replace(config, prompts=replace(config.prompts, source=OWN_PROMPTS)), as_prompts(prompts)
    if config.prompts.source == OWN_PROMPTS:
        raise PromptError("the prompts of this run were given to train(); give them again")
    return config, load_prompts(config.prompts)


def as_saved(config: Config, saved: Config, run: RunFolder) -> Config:
    """A configuration to resume with, under the run's own name.

    Args:
        config: What is wanted.
        saved: The run's own.
        run: The run folder.

    Raises:
        ConfigError: It changes what must not change in a run.
    """
    resume_overrides(saved, config, saved_file=run.config_file)
    return replace(config, run=saved.run)


# ---- what a command cannot make again --------------------------------------------------------------------------------


def objects_of(config: Config, policy: Policy, reward: WeightedSum, heldout: WeightedSum | None) -> list[str]:
    """Names what no command can make again of a run.

    Args:
        config: The run's.
        policy: At its pretrained weights.
        reward: What is optimised.
        heldout: What is only measured; None for none.
    """
    found = [PIPELINE] if policy.source is None or type(policy) is not Policy else []
    for total in (reward,) if heldout is None else (reward, heldout):
        found += [_of(term) for term in total.terms if not (total.by_name and _is_installed(term))]
    return [*found, *([PROMPTS] if config.prompts.source == OWN_PROMPTS else [])]


def _of(term: RewardTerm) -> str:
    return f"the reward {term.name!r}"


def made_again(run: Path, terms: Sequence[RewardTerm]) -> tuple[RewardTerm, ...]:
    """Those of a run's rewards that a command can make again."""
    objects = _objects(run)
    return tuple(term for term in terms if _of(term) not in objects)


def _is_installed(term: RewardTerm) -> bool:
    """Whether a name means the same in another process, unlike one that this program has registered."""
    return ":" in term.name or term.name in BUILT_IN or term.name in entry_points(group=ENTRY_POINT_GROUP).names


def record_objects(run: Path, objects: Sequence[str], prompts: Sequence[Prompt]) -> None:
    """Writes `objects.json`, and prompts that were handed over to `prompts.jsonl`, on the main process."""
    write_record(run, OBJECTS, list(objects))
    if PROMPTS not in objects:
        return
    try:
        lines = [json.dumps({"text": prompt.text, "metadata": prompt.metadata}) for prompt in prompts]
    except (TypeError, ValueError):  # pictures or other objects among the metadata
        return
    with ledger.noted(run, OWN_PROMPTS_FILE) as partial:
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def evaluation_source(run: Path, config: Config) -> list[Prompt]:
    """The prompts that a run takes its evaluation set from, for a command that looks back at it.

    Raises:
        RunError: They were handed over in Python and could not be kept, or are damaged.
    """
    given = config.evaluation.prompts or config.prompts
    if given.source != OWN_PROMPTS:
        return load_prompts(given)
    file = run / OWN_PROMPTS_FILE
    if (reason := ledger.misfit(run, OWN_PROMPTS_FILE)) is not None:
        file = ledger.copy_of(run, OWN_PROMPTS_FILE) or refuse(reason)
    if not file.is_file():
        refuse_objects(run, only=(PROMPTS,))
    entries = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [Prompt(text=entry["text"], metadata=entry["metadata"]) for entry in entries]


def _objects(run: Path) -> list[str]:
    objects = read_record(run, OBJECTS) or []
    assert isinstance(objects, list)
    return objects


def refuse_objects(run: Path, *, only: Collection[str] | None = None) -> None:
    """Refuses to look at or to continue a run by a command that cannot make its objects again.

    Args:
        run: The run folder.
        only: The kinds of object that the command needs; None for all.

    Raises:
        RunError: Names them, and the call in Python.
    """
    objects = _objects(run)
    if only is not None:
        objects = [name for name in objects if name in only]
    if objects:
        raise RunError(
            f"{run} was started from Python with {', '.join(objects)} of its own, which a command cannot make again; "
            f"continue it with trainers.loop.train(..., resume={str(run)!r}), which also evaluates it; its weights are "
            f"in {run / 'lora'}"
        )
