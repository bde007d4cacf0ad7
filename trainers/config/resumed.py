"""The configuration that a run continues with: the saved one, but for the few keys that may change."""

from collections.abc import Sequence
from pathlib import Path

from trainers.config import yaml_text
from trainers.config.config import Config
from trainers.config.errors import ConfigError, show
from trainers.config.io import ConfigFile, load_config, to_plain
from trainers.config.locations import absolute, moved
from trainers.config.overrides import SOURCE, parse_overrides

MAY_CHANGE_ON_RESUME = (
    "epochs",
    "max_minutes",
    "optimizer.schedule_epochs",
    "checkpoints.",
    "tracking.",
    "distributed.",
    "reward_processes.",
)
_SET_BY_FOLDER = "run."


def load_resumed(file: ConfigFile, overrides: Sequence[str], *, given: str | None = None) -> tuple[Config, Config]:
    """The saved configuration, and the one to continue with.

    Args:
        file: The saved configuration.
        overrides: `--key value` tokens for keys that may change.
        given: A configuration that the run is to have from now on, with the overrides; None for the saved one.

    Raises:
        ConfigError: Another key would change.
    """
    saved = file.config()
    refuse_run_keys(saved, overrides, folder=file.path.absolute().parent)
    if given is not None:
        overrides = resume_overrides(saved, absolute(load_config(given, overrides)), saved_file=file.path)
    if not overrides:
        return saved, saved
    wanted = absolute(file.config(overrides, same_run=True))
    resume_overrides(saved, wanted, saved_file=file.path)
    return saved, wanted


def load_moved(file: ConfigFile, overrides: Sequence[str]) -> Config:
    """The saved configuration of a run to look back at, with other places of its files.

    Raises:
        ConfigError: Something else would change.
    """
    saved, wanted = load_resumed(file, overrides)
    if moved(saved, wanted) != wanted:
        raise ConfigError(
            f"{SOURCE}: only where files lie may be given here, such as --model.path, --prompts.source or "
            "--rewards.0.name FILE.py:NAME"
        )
    return wanted


def refuse_run_keys(saved: Config, overrides: Sequence[str], *, folder: Path) -> None:
    """Refuses overrides that would give a resumed run another name or folder than where it lies now.

    Args:
        saved: Its configuration.
        overrides: The tokens.
        folder: The run folder, which may have been moved since.

    Raises:
        ConfigError: An override would.
    """
    kept = {key: value for key, value in _leaves(saved).items() if key.startswith(_SET_BY_FOLDER)}
    for key, text in parse_overrides(overrides).items():
        is_here = key == "run.output_dir" and Path(text).expanduser().absolute() == folder.parent
        is_here = is_here or (key == "run.name" and text == folder.name)
        if key in kept and not is_here and (None if text == "null" else text) != kept[key]:
            raise ConfigError(
                f"{SOURCE}: {key}: a run that is resumed stays in its folder and keeps its {key} ({show(kept[key])}); "
                "leave it out, or move the folder and name it as --resume"
            )


def resume_overrides(saved: Config, wanted: Config, *, saved_file: Path) -> list[str]:
    """Overrides that turn `saved` into `wanted`, which may differ only in keys that may change on resume.

    The run folder's own keys (`run.*`) are kept from the saved configuration.

    Raises:
        ConfigError: Other keys differ; the message lists them with both values.
    """
    before, after = _leaves(saved), _leaves(wanted)
    elsewhere = _leaves(moved(saved, wanted))
    keys = [key for key in {**before, **after} if not key.startswith(_SET_BY_FOLDER)]
    changed = [key for key in keys if before.get(key, ...) != after.get(key, ...)]
    is_moved = {key for key in changed if elsewhere.get(key, ...) == after.get(key, ...)}
    refused = [key for key in changed if key not in is_moved and not key.startswith(MAY_CHANGE_ON_RESUME)]
    if refused:
        both = [f"{key} (saved {_shown(before, key)}, now {_shown(after, key)})" for key in refused]
        may = ", ".join(f"{key}*" if key.endswith(".") else key for key in MAY_CHANGE_ON_RESUME)
        raise ConfigError(
            f"{saved_file}: differs from the configuration given: {', '.join(both)}; on resume only {may}, and "
            f"where files lie, may change; start a new run for the rest"
        )
    return [_token(key, after[key]) for key in changed]


def _leaves(config: Config) -> dict[str, object]:
    """Every key that is no group, dotted, with its value; lists are one value."""

    def walk(node: object, path: str) -> dict[str, object]:
        if not isinstance(node, dict) or not node:
            return {path: node}
        branches = [walk(value, f"{path}.{key}" if path else key) for key, value in node.items()]
        return {key: value for branch in branches for key, value in branch.items()}

    return walk(to_plain(config, full=True), "")


def _token(key: str, value: object) -> str:
    return f"--{key}={value if isinstance(value, str) else yaml_text.dump(value, inline=True)}"


def _shown(leaves: dict[str, object], key: str) -> str:
    return show(leaves[key]) if key in leaves else "absent"
