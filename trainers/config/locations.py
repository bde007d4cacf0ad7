"""Where a configuration's files lie, as opposed to what they are: hashes say that, so a place may change on a resume.

Places are `model.path`, `model.config` and `model.revision`, `adapter.init`, prompt files, judged images, the files in
`file.py:name`, and options of rewards that name a file or folder. A run keeps them absolute, to go on from whatever
folder it is resumed in.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ddpo.regularization import RegularizationConfig
from ddpo.weights.adapter import AdapterConfig, LoraConfig
from rewards.combine.weighted_sum import RewardTerm
from trainers.config.config import Config
from trainers.prompt_files import is_file_name
from trainers.prompts import PromptConfig


def absolute(config: Config) -> Config:
    """The configuration with every relative place of something that exists made absolute."""
    return replace(
        config,
        model=replace(config.model, path=_absolute(config.model.path), config=_absolute_folder(config.model.config)),
        adapter=_begun_at(config.adapter, None if config.init is None else _absolute(config.init)),
        rewards=tuple(map(_absolute_term, config.rewards)),
        heldout_rewards=tuple(map(_absolute_term, config.heldout_rewards)),
        constraints=tuple(replace(bound, reward=_absolute_spec(bound.reward)) for bound in config.constraints),
        prompts=_absolute_prompts(config.prompts),
        offline=None if config.offline is None else replace(config.offline, source=_absolute(config.offline.source)),
        regularization=_with_images(config.regularization, _absolute_folder(config.regularization.denoising.images)),
        evaluation=replace(
            config.evaluation,
            prompts=None if config.evaluation.prompts is None else _absolute_prompts(config.evaluation.prompts),
        ),
    )


def _begun_at(adapter: AdapterConfig, place: str | None) -> AdapterConfig:
    """An adapter whose LoRA to begin from, if it has one, lies in another place."""
    if not isinstance(adapter, LoraConfig) or adapter.init is None or place is None:
        return adapter
    return replace(adapter, init=place)


def _with_images(options: RegularizationConfig, place: str | None) -> RegularizationConfig:
    return replace(options, denoising=replace(options.denoising, images=place))


def _absolute(place: str) -> str:
    path = Path(place).expanduser()
    return str(path.absolute()) if path.exists() else place


def _absolute_folder(place: str | None) -> str | None:
    return None if place is None else _absolute(place)


def _absolute_spec(spec: str) -> str:
    """`file.py:name` with the whole path of the file; another name as it is."""
    file, _, name = spec.rpartition(":")
    return f"{_absolute(file)}:{name}" if file.endswith(".py") else spec


def _absolute_prompts(config: PromptConfig) -> PromptConfig:
    source = _absolute(config.source) if is_file_name(config.source) else _absolute_spec(config.source)
    return replace(config, source=source)


def _absolute_term(term: RewardTerm) -> RewardTerm:
    options = {key: _absolute(str(value)) if _is_place(value) else value for key, value in term.options.items()}
    return replace(term, name=_absolute_spec(term.name), options=options)


def _is_place(value: object) -> bool:
    """Whether an option is written like a path: `owner/name` of a hub is none unless it exists as a folder."""
    return isinstance(value, str) and "/" in value and "://" not in value


# ---- another place of the same ---------------------------------------------------------------------------------------


def moved(saved: Config, wanted: Config) -> Config:
    """A saved configuration with the places of another one, wherever both mean a place."""
    evaluated, now = saved.evaluation.prompts, wanted.evaluation.prompts
    judged, others = saved.offline, wanted.offline
    return replace(
        saved,
        offline=judged
        if judged is None or others is None
        else replace(judged, source=others.source, cache=others.cache),
        regularization=_with_images(saved.regularization, wanted.regularization.denoising.images)
        if saved.regularization.denoising.images is not None and wanted.regularization.denoising.images is not None
        else saved.regularization,
        model=replace(saved.model, path=wanted.model.path, revision=wanted.model.revision, config=wanted.model.config),
        adapter=_begun_at(saved.adapter, wanted.init),
        rewards=_moved_terms(saved.rewards, wanted.rewards),
        heldout_rewards=_moved_terms(saved.heldout_rewards, wanted.heldout_rewards),
        constraints=tuple(
            replace(old, reward=_moved_spec(old.reward, new.reward))
            for old, new in zip(saved.constraints, wanted.constraints, strict=True)
        )
        if len(saved.constraints) == len(wanted.constraints)
        else saved.constraints,
        prompts=_moved_prompts(saved.prompts, wanted.prompts),
        evaluation=saved.evaluation
        if evaluated is None or now is None
        else replace(saved.evaluation, prompts=_moved_prompts(evaluated, now)),
    )


def _moved_spec(old: str, new: str) -> str:
    """The new place of the same name in a Python file."""
    is_same = old.rpartition(":")[2] == new.rpartition(":")[2]
    both_files = old.rpartition(":")[0].endswith(".py") and new.rpartition(":")[0].endswith(".py")
    return new if is_same and both_files else old


def _moved_prompts(old: PromptConfig, new: PromptConfig) -> PromptConfig:
    if is_file_name(old.source) and is_file_name(new.source):
        return replace(old, source=new.source)
    return replace(old, source=_moved_spec(old.source, new.source))


def _moved_terms(old: tuple[RewardTerm, ...], new: tuple[RewardTerm, ...]) -> tuple[RewardTerm, ...]:
    return tuple(map(_moved_term, old, new)) if len(old) == len(new) else old


def _moved_term(old: RewardTerm, new: RewardTerm) -> RewardTerm:
    options = {key: _moved_option(value, new.options.get(key)) for key, value in old.options.items()}
    return replace(old, name=_moved_spec(old.name, new.name), options=options)


def _moved_option(old: object, new: object) -> object:
    return new if _is_place(old) and isinstance(new, str) and Path(new).expanduser().exists() else old


def placeless(options: Mapping[str, object]) -> dict[str, object]:
    """A reward's options without the folders that its files lie in, to be hashed."""
    return {
        key: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for key, value in options.items()
    }
