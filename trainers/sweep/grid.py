"""The grid of a sweep: keys with several values each, every combination of which is a run's overrides."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ddpo.validation import UserError
from trainers.config.overrides import parse_overrides

_OWN = {
    "seed": "the seeds of a sweep are given by --seeds N",
    "run.name": "a sweep names its runs itself",
    "run.output_dir": "a sweep's runs lie in one folder, --run.output_dir/NAME",
}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A key of the configuration and the values that it takes.

    Attributes:
        key: Dotted.
        values: At least one, as texts of YAML.
    """

    key: str
    values: tuple[str, ...]


def read_axes(grids: Sequence[str], overrides: Sequence[str]) -> tuple[Axis, ...]:
    """The axes of `key=a,b` texts; commas within brackets, braces and quotes belong to a value.

    Args:
        grids: The texts.
        overrides: `--key value` tokens for every run.

    Raises:
        UserError: One is not written so, a key is given twice, also as an override, or is the sweep's own.
    """
    axes = tuple(map(_axis, grids))
    given = set(parse_overrides(overrides))
    for place, axis in enumerate(axes):
        if axis.key in _OWN:
            raise UserError(f"--grid {axis.key}: {_OWN[axis.key]}")
        if axis.key in (other.key for other in axes[:place]):
            raise UserError(f"--grid {axis.key} is given twice; write all its values in one, {axis.key}=a,b")
        if axis.key in given:
            raise UserError(f"--grid {axis.key} is also given as --{axis.key}; leave out one of them")
    return axes


def _axis(text: str) -> Axis:
    key, equals, listed = text.partition("=")
    key = key.strip().removeprefix("--")
    values = tuple(value.strip() for value in _split(listed))
    if not key or not equals or not all(values):
        raise UserError(f"--grid is written KEY=VALUE,VALUE such as optimizer.learning_rate=1e-4,1e-3, got {text!r}")
    twice = next((value for place, value in enumerate(values) if value in values[:place]), None)
    if twice is not None:
        raise UserError(f"--grid {key}: the value {twice} occurs twice")
    return Axis(key=key, values=values)


def _split(text: str) -> list[str]:
    """The parts between the commas outside of brackets, braces and quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        else:
            depth += (sign in "[{") - (sign in "]}")
        if sign == "," and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def combinations(axes: Sequence[Axis]) -> Iterator[dict[str, str]]:
    """Value by key of every combination, the last key's values changing first; a single empty one without axes."""
    for values in itertools.product(*(axis.values for axis in axes)):
        yield {axis.key: value for axis, value in zip(axes, values, strict=True)}


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """For each dotted key its last word, or as many of its last words as tell it from the others."""
    names = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        others = [f".{other}" for other in keys if other != key]
        named = (ending for ending in endings if not ending[0].isdigit())
        names[key] = next((name for name in named if not any(o.endswith(f".{name}") for o in others)), key)
    return names
