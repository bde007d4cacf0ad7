"""Command-line overrides: `--group.key value` on top of a YAML mapping.

    --optimizer.learning_rate 1e-4    --rewards.0.weight 2     --rewards.1.name jpeg_compressibility  (appends)
    --model.offload true              --run.name null          --kl.kind adaptive --kl.target 3

Values are YAML; where a key holds text, the value is taken as it is. A `kind` that changes drops the keys of the other
kind from the file. Kinds are applied first, so order on the command line does not matter.
"""

from collections.abc import Collection, Sequence

from trainers import yaml_text
from trainers.config_errors import ConfigError
from trainers.config_schema import hint_at, is_optional, kinds_of, plain

SOURCE = "command line"


def split_overrides(arguments: Sequence[str], *, own: Collection[str]) -> tuple[list[str], list[str]]:
    """Separates a command's own arguments from overrides.

    Args:
        arguments: What follows the command's name.
        own: The command's own options, e.g. `--resume`.

    Returns:
        Own arguments, and overrides as `--key=value` or `--key`, `value` as they stood.
    """
    mine: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        name, equals, _ = token.partition("=")
        if not token.startswith("--") or name in own:
            mine.append(token)
            continue
        overrides.append(token)
        if not equals and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return mine, overrides


def parse_overrides(tokens: Sequence[str]) -> dict[str, str]:
    """Pairs of dotted key and text; the last of equal keys wins.

    Raises:
        ConfigError: something is not `--key value` or `--key=value`.
    """
    pairs: dict[str, str] = {}
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        name, equals, value = token.partition("=")
        if not name.startswith("--") or len(name) == 2:
            raise ConfigError(
                f"{SOURCE}: {token!r}: overrides are written --key value, e.g. --optimizer.learning_rate 1e-4"
            )
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{SOURCE}: {name[2:]}: needs a value: {name} VALUE")
            value = rest.pop(0)
        pairs[name[2:]] = value
    return pairs


def apply_overrides(data: object, pairs: dict[str, str]) -> object:
    """The mapping of a YAML file with overrides written into it; keys are checked later, with the rest.

    Raises:
        ConfigError: a value is not YAML, or a list has no such place.
    """
    for key in sorted(pairs, key=lambda key: not key.endswith(".kind")):
        if key.endswith(".kind"):
            data = _switched(data, key.removesuffix(".kind"), pairs[key])
        data = _written(data, key.split("."), _value(key, pairs[key], data), key)
    return data


def _value(key: str, text: str, data: object) -> object:
    hint = hint_at(key, data)
    if plain(hint) is str:
        return None if text == "null" and is_optional(hint) else text
    try:
        return yaml_text.parse(text)
    except ValueError as error:
        raise ConfigError(f"{SOURCE}: {key}: {text!r} is not a YAML value: {error}") from error


def _switched(data: object, group: str, kind: str) -> object:
    """Forgets a union's keys when its kind changes: they belong to the other kind."""
    current: object = data
    for part in group.split("."):
        current = current.get(part) if isinstance(current, dict) else None
    kinds = kinds_of(hint_at(group, data))
    if not isinstance(current, dict) or not kinds or current.get("kind", next(iter(kinds))) == kind:
        return data
    return _written(data, group.split("."), {}, group)


def _written(place: object, parts: Sequence[str], value: object, key: str) -> object:
    """A copy of `place` with `value` at the end of `parts`; one past the end of a list appends."""
    if not parts:
        return value
    part, *rest = parts
    if isinstance(place, list) or (part.isdecimal() and not isinstance(place, dict)):
        return _entered(place if isinstance(place, list) else [], part, rest, value, key)
    keys = place if isinstance(place, dict) else {}
    return {**keys, part: _written(keys.get(part), rest, value, key)}


def _entered(entries: list, part: str, rest: Sequence[str], value: object, key: str) -> list:
    if not part.isdecimal() or int(part) > len(entries):
        count = f"{len(entries)} given, numbered from 0" if entries else "none given"
        raise ConfigError(f"{SOURCE}: {key}: there is no entry {part} in the list ({count})")
    index = int(part)
    old = entries[index] if index < len(entries) else None
    return [*entries[:index], _written(old, rest, value, key), *entries[index + 1 :]]
