"""Reads and writes configurations: YAML file + command-line overrides -> `Config` -> YAML.

Types are checked strictly (pydantic, JSON mode: true is no number, "5" is no number); ranges and combinations by the
dataclasses themselves. Every problem is one line: `FILE: optimizer.learning_rate: must be a number, got 'fast'`.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from ddpo.validation import FieldError
from trainers.config import Config, yaml_text
from trainers.config.errors import ConfigError, explain, guess, show
from trainers.config.overrides import SOURCE, apply_overrides, parse_overrides
from trainers.config.plausible import check_texts
from trainers.config.schema import default_of
from trainers.shipped_configs import CONFIGS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["ConfigError", "ConfigFile", "config_of", "find_config", "load_config", "to_yaml"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """A configuration file, read once.

    Attributes:
        path: The file.
        data: Its mapping of keys, unchecked.
    """

    path: Path
    data: dict

    @classmethod
    def read(cls, path: str | Path) -> "ConfigFile":
        """Reads a YAML file, or one shipped in `configs/` by its name, e.g. `shapes_ppo`.

        Raises:
            ConfigError: There is none, or it is not a mapping of keys in YAML.
        """
        file = find_config(path)
        return cls(path=file, data=_read(file))

    def config(self, overrides: Sequence[str] = (), *, same_run: bool = False) -> Config:
        """The configuration, with `--key value` tokens as on the command line; see `trainers.config.overrides`.

        Args:
            overrides: The tokens.
            same_run: Whether they go on with the run whose configuration this is.

        Raises:
            ConfigError: One line per problem, naming file (or command line), key, what is expected and what was
                received.
        """
        pairs = parse_overrides(overrides)
        config = _checked(apply_overrides(self.data, pairs, same_run=same_run), str(self.path), pairs)
        if not config.rewards and config.offline is None:
            raise ConfigError(
                f"{self.path}: rewards: must be a list of at least one reward, e.g. [{{name: jpeg_compressibility}}]"
            )
        return config


def _checked(data: object, source: str, pairs: Mapping[str, str]) -> Config:
    """The configuration of a mapping.

    Args:
        data: The mapping, overrides included.
        source: Where it is from, for messages.
        pairs: The overrides.

    Raises:
        ConfigError: One line per problem.
    """
    try:
        check_texts(data)
    except FieldError as error:
        overridden = any(f"{error.field}.".startswith(f"{name}.") for name in pairs)
        where = SOURCE if overridden else source
        raise ConfigError(f"{where}: {error.field}: must be {error.expected}, got {show(error.value)}") from error
    try:
        config = _adapter().validate_json(json.dumps(data, default=_group_keys), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(_lines(error, source, pairs))) from error
    for field, value in _no_numbers(to_plain(config, full=True)):
        where = SOURCE if any(f"{field}.".startswith(f"{name}.") for name in pairs) else source
        raise ConfigError(f"{where}: {field}: must be a number, got {show(value)}")
    return config


def _no_numbers(value: object, field: str = "") -> Iterator[tuple[str, float]]:
    """The NaN of a configuration, with the names of their keys; a comparison with one is false, whatever it checks."""
    if isinstance(value, float) and math.isnan(value):
        yield field, value
    elif isinstance(value, Mapping | list | tuple):
        for name, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _no_numbers(part, f"{field}.{name}".removeprefix("."))


def _group_keys(group: object) -> dict[str, object]:
    """A group among plain values, as its keys."""
    if not dataclasses.is_dataclass(group) or isinstance(group, type):
        raise ConfigError(f"a configuration holds texts, numbers, lists and mappings, got {type(group).__name__}")
    keys = _plain_value(group, None, full=False)
    assert isinstance(keys, dict)
    return keys


def config_of(keys: Mapping[str, object]) -> Config:
    """A configuration from nested dictionaries: what a YAML file would hold, rewards not needed.

    Args:
        keys: What differs from the defaults, e.g. `{"sampler": {"num_steps": 20}, "epochs": 5}`.

    Raises:
        ConfigError: One line per problem.
    """
    return _checked(dict(keys), "config_of", {})


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration: `ConfigFile.read(path).config(overrides)`.

    Args:
        path: A YAML file, with or without its suffix, or the name of a shipped configuration.
        overrides: Words of the command line, e.g. `["--epochs", "5", "--sampler.num_steps", "20"]`.

    Raises:
        ConfigError: No such file, or one line per problem in it.
    """
    return ConfigFile.read(path).config(overrides)


def find_config(path: str | Path) -> Path:
    """The file that `path` means: itself, else `path`.yaml, else the shipped configuration of that name."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder, not a configuration; continue a run with: ddpo train --resume {path}")
    candidates = [path] if path.suffix else [path, path.with_name(path.name + ".yaml"), CONFIGS / f"{path.name}.yaml"]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        shipped = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
        raise ConfigError(
            f"{path}: no such configuration{guess(path.stem, shipped)}; shipped: {', '.join(shipped) or 'none'}"
        )
    return found


def to_yaml(config: Config, *, full: bool = False) -> str:
    """Writes YAML that `load_config` reads back to an equal `Config`: what differs from the defaults, or every key."""
    return yaml_text.dump(to_plain(config, full=full))


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


def _lines(error: ValidationError, source: str, pairs: Mapping[str, str]) -> list[str]:
    lines = []
    for problem in error.errors(include_url=False):
        key, sentence = explain(problem)
        kind = f"{key.rpartition('.')[0]}.kind"
        overridden = any(
            f"{key}.".startswith(f"{name}.") or name == kind or name.startswith(f"{key}.") for name in pairs
        )
        lines.append(": ".join(part for part in (SOURCE if overridden else source, key, sentence) if part))
    return lines


def to_plain(group: "DataclassInstance", *, full: bool) -> dict[str, object]:
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
    keys = to_plain(value, full=full)
    kind = getattr(value, "kind", None) if type(value) is not type(default) else None
    return keys if kind is None else {"kind": kind, **keys}
