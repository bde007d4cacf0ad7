"""Command-line overrides: `--group.key value` on top of a YAML mapping.

    --optimizer.learning_rate 1e-4    --rewards.0.weight 2     --rewards.1.name jpeg_compressibility  (appends)
    --model.offload true              --run.name null          --kl.kind adaptive --kl.target 3

Values are YAML; where a key holds text, the value is taken as it is, and where it holds a list of words, one word is a
list of one. A key that says what its group is about drops what
the file says of the former thing: a `kind` the keys of the other kind, a reward's `name` its weight and options, a
bound's `reward` the bound, `model.path` revision, variant and config. Those keys are applied first, so order on the
command line does not matter.
"""

from collections.abc import Sequence

from ddpo.credit.lagrangian import Constraint
from rewards.combine.weighted_sum import RewardTerm
from trainers.config import ModelConfig, yaml_text
from trainers.config.errors import ConfigError
from trainers.config.schema import element_of, entry_at, hint_at, is_optional, kinds_of, plain, words

SOURCE = "command line"

_ABOUT: dict[object, tuple[str, tuple[str, ...]]] = {
    RewardTerm: ("name", ("weight", "normalize", "options", "schedule", "label")),
    Constraint: ("reward", ("at_least", "at_most", "method", "penalty", "rate", "multiplier", "margin")),
    ModelConfig: ("path", ("revision", "variant", "config")),
}
"""Of a group, the key that says what it is about, and those that mean nothing for another thing."""


def parse_overrides(tokens: Sequence[str]) -> dict[str, str]:
    """Pairs of dotted key and text; the last of equal keys wins.

    Raises:
        ConfigError: Something is not `--key value` or `--key=value`.
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


def apply_overrides(data: object, pairs: dict[str, str], *, same_run: bool = False) -> object:
    """The mapping of a YAML file with overrides written into it; keys are checked later, with the rest.

    Args:
        data: The mapping.
        pairs: Dotted keys and their texts.
        same_run: Whether the overrides go on with the run of `data`: another model's path is then where the same one
            lies now.

    Raises:
        ConfigError: A value is not YAML, or a list has no such place.
    """
    whole = [key for key in pairs if any(other.startswith(f"{key}.") for other in pairs)]
    leading = [key for key in pairs if key.endswith(".kind") or _leads(key, data)]
    for key in dict.fromkeys([*whole, *leading, *pairs]):
        if key.endswith(".kind"):
            data = _switched(data, key.removesuffix(".kind"), pairs[key])
        elif key in leading and not same_run:
            data = _replaced(data, key, pairs[key])
        data = _written(data, key.split("."), _value(key, pairs[key], data), key)
    return data


def _value(key: str, text: str, data: object) -> object:
    hint = hint_at(key, data)
    if plain(hint) is str:
        return None if text == "null" and is_optional(hint) else text
    try:
        value = yaml_text.parse(text)
    except ValueError as error:
        raise ConfigError(f"{SOURCE}: {key}: {text!r} is not a YAML value: {error}") from error
    words_of_list = plain(element_of(plain(hint)))
    return [value] if isinstance(value, str) and (words_of_list is str or words(words_of_list)) else value


def _switched(data: object, group: str, kind: str) -> object:
    """Forgets a union's keys when its kind changes: they belong to the other kind."""
    current = entry_at(data, group)
    kinds = kinds_of(hint_at(group, data))
    if not isinstance(current, dict) or not kinds or current.get("kind", next(iter(kinds))) == kind:
        return data
    return _written(data, group.split("."), {}, group)


def _leads(key: str, data: object) -> bool:
    """Whether a key says what its group is about."""
    group, _, name = key.rpartition(".")
    return bool(group) and name == _ABOUT.get(plain(hint_at(group, data)), ("", ()))[0]


def _replaced(data: object, key: str, text: str) -> object:
    """Forgets what a group says of one thing when it is about another one from now on."""
    group, _, name = key.rpartition(".")
    old = entry_at(data, group)
    if not isinstance(old, dict) or name not in old or old[name] == text:
        return data
    _, owned = _ABOUT[plain(hint_at(group, data))]
    return _written(data, group.split("."), {key: value for key, value in old.items() if key not in owned}, group)


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
