"""Reads and writes configurations: YAML file + command-line overrides -> `Config` -> YAML.

Types are checked strictly (pydantic, JSON mode: true is no number, "5" is no number); ranges and combinations by the
dataclasses themselves. Every problem is one line: `FILE: optimizer.learning_rate: must be a number, got 'fast'`.
"""

import dataclasses
import difflib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from trainers import yaml_text
from trainers.config import Config
from trainers.config_errors import ConfigError, explain, show
from trainers.config_schema import default_of
from trainers.overrides import SOURCE, apply_overrides, parse_overrides
from trainers.shipped import CONFIGS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["ConfigError", "find_config", "load_config", "load_resumed", "resume_overrides", "to_yaml"]

MAY_CHANGE_ON_RESUME = ("epochs", "max_minutes", "checkpoints.", "tracking.", "distributed.", "reward_processes.")
_SET_BY_FOLDER = "run."


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration.

    Args:
        path: A YAML file, or the name of one shipped in `configs/`, e.g. `shapes_ppo`.
        overrides: `--key value` tokens as on the command line; see `trainers.overrides`.

    Raises:
        ConfigError: one line per problem, naming file (or command line), key, what is expected and what was received.
    """
    file = find_config(path)
    pairs = parse_overrides(overrides)
    data = apply_overrides(_read(file), pairs)
    try:
        config = _adapter().validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(_lines(error, file, pairs))) from error
    if not config.rewards:
        raise ConfigError(
            f"{file}: rewards: must be a list of at least one reward, e.g. [{{name: jpeg_compressibility}}]"
        )
    return config


def find_config(path: str | Path) -> Path:
    """The file that `path` means: itself, else `path`.yaml, else the shipped configuration of that name."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder, not a configuration; continue a run with: ddpo train --resume {path}")
    candidates = [path] if path.suffix else [path, path.with_name(path.name + ".yaml"), CONFIGS / f"{path.name}.yaml"]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        shipped = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
        close = difflib.get_close_matches(path.stem, shipped, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(f"{path}: no such configuration{hint}; shipped: {', '.join(shipped) or 'none'}")
    return found


def to_yaml(config: Config, *, full: bool = False) -> str:
    """Writes YAML that `load_config` reads back to an equal `Config`: what differs from the defaults, or every key."""
    return yaml_text.dump(_to_plain(config, full=full))


def load_resumed(saved_file: Path, overrides: Sequence[str]) -> Config:
    """The configuration a run continues with: the saved one, with overrides of keys that may change.

    Raises:
        ConfigError: an override changes another key.
    """
    wanted, saved = load_config(saved_file, overrides), load_config(saved_file)
    refuse_run_keys(saved, overrides)
    resume_overrides(saved, wanted, saved_file=saved_file)
    return wanted


def refuse_run_keys(saved: Config, overrides: Sequence[str]) -> None:
    """Refuses overrides that give a run to be resumed another name or folder.

    Raises:
        ConfigError: They do.
    """
    kept = {key: value for key, value in _leaves(saved).items() if key.startswith(_SET_BY_FOLDER)}
    for key, text in parse_overrides(overrides).items():
        if key in kept and (None if text == "null" else text) != kept[key]:
            raise ConfigError(
                f"{SOURCE}: {key}: a run that is resumed stays in its folder and keeps its {key} ({show(kept[key])}); "
                "leave it out"
            )


def resume_overrides(saved: Config, wanted: Config, *, saved_file: Path) -> list[str]:
    """Overrides that turn `saved` into `wanted`, when only keys differ that may change on resume.

    The run folder's own keys (`run.*`) are kept from the saved configuration.

    Raises:
        ConfigError: other keys differ; the message lists them with both values.
    """
    before, after = _leaves(saved), _leaves(wanted)
    keys = [key for key in {**before, **after} if not key.startswith(_SET_BY_FOLDER)]
    changed = [key for key in keys if before.get(key, ...) != after.get(key, ...)]
    refused = [key for key in changed if not key.startswith(MAY_CHANGE_ON_RESUME)]
    if refused:
        both = [f"{key} (saved {_shown(before, key)}, now {_shown(after, key)})" for key in refused]
        may = ", ".join(f"{key}*" if key.endswith(".") else key for key in MAY_CHANGE_ON_RESUME)
        raise ConfigError(
            f"{saved_file}: differs from the configuration given: {', '.join(both)}; on resume only {may} may change, "
            f"start a new run for the rest"
        )
    return [_token(key, after[key]) for key in changed]


@cache
def _adapter() -> TypeAdapter[Config]:
    return TypeAdapter(Config)


def _read(file: Path) -> dict:
    try:
        data = yaml_text.parse(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"{file}: must be a mapping of keys, got {show(data)}")
    return data or {}


def _lines(error: ValidationError, file: Path, pairs: dict[str, str]) -> list[str]:
    lines = []
    for problem in error.errors(include_url=False):
        key, sentence = explain(problem)
        kind = f"{key.rpartition('.')[0]}.kind"
        overridden = any(
            f"{key}.".startswith(f"{name}.") or name == kind or name.startswith(f"{key}.") for name in pairs
        )
        lines.append(": ".join(part for part in (SOURCE if overridden else str(file), key, sentence) if part))
    return lines


def _to_plain(group: "DataclassInstance", *, full: bool) -> dict[str, object]:
    """A group's keys; those with default values are left out unless `full`."""
    keys = {}
    for field in dataclasses.fields(group):
        value, default = getattr(group, field.name), default_of(field)
        if full or value != default:
            keys[field.name] = _plain_value(value, default, full=full)
    return keys


def _plain_value(value: object, default: object, *, full: bool) -> object:
    if isinstance(value, tuple):
        return [_plain_value(entry, None, full=full) for entry in value]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    keys = _to_plain(value, full=full)
    kind = getattr(value, "kind", None) if type(value) is not type(default) else None
    return keys if kind is None else {"kind": kind, **keys}


def _leaves(config: Config) -> dict[str, object]:
    """Every key that is no group, dotted, with its value; lists are one value."""

    def walk(node: object, path: str) -> dict[str, object]:
        if not isinstance(node, dict) or not node:
            return {path: node}
        branches = [walk(value, f"{path}.{key}" if path else key) for key, value in node.items()]
        return {key: value for branch in branches for key, value in branch.items()}

    return walk(_to_plain(config, full=True), "")


def _token(key: str, value: object) -> str:
    return f"--{key}={value if isinstance(value, str) else yaml_text.dump(value, inline=True)}"


def _shown(leaves: dict[str, object], key: str) -> str:
    return show(leaves[key]) if key in leaves else "absent"
