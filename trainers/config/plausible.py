"""Refuses what cannot be meant: numbers far outside of any use, and texts that no file can hold.

A number such as 10^9 samples would not fail but stall, for minutes, without a word; a weight of 10^300 would end in a
message about the learning rate. Limits of a single key, such as a seed's, stand with the key.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping

from ddpo.validation import check, misfit

LARGEST_COUNT = 10**6
LARGEST_NUMBER = 1e9
_GROUP = "a group, such as SamplerConfig(...); trainers.config.io.config_of makes a Config of dictionaries"
_SEED = "seed"  # any whole number that torch takes


def check_plausible(config: object) -> None:
    """Looks through a configuration: its groups, lists and the options of its rewards.

    Raises:
        FieldError: A dictionary stands for a group, a whole number is beyond `LARGEST_COUNT`, another finite number
            beyond `LARGEST_NUMBER`, or a text holds a NUL or half a surrogate pair.
    """
    check_texts(config)
    for key, value in _leaves(config, ""):
        if ".options." in key:  # numbers that only the reward can judge
            continue
        if isinstance(value, int) and not isinstance(value, bool) and key.rpartition(".")[2] != _SEED:
            check(abs(value) <= LARGEST_COUNT, key, value, f"at most {LARGEST_COUNT:,}")
        elif isinstance(value, float) and math.isfinite(value):
            check(abs(value) <= LARGEST_NUMBER, key, value, f"at most {LARGEST_NUMBER:g}")


def check_texts(value: object) -> None:
    """Refuses texts that neither a file nor a tokenizer can hold.

    Args:
        value: A configuration, or the mapping that it will be made of.

    Raises:
        FieldError: One has a NUL, or half of a surrogate pair.
    """
    for key, text in _leaves(value, ""):
        wrong = misfit(text) if isinstance(text, str) else None
        check(wrong is None, key, text, f"text without {wrong}")


def _leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    """Every value that is no group, mapping or list, with its dotted key."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            key, entry = f"{path}.{field.name}" if path else field.name, getattr(value, field.name)
            check(not isinstance(entry, Mapping) or field.name == "options", key, entry, _GROUP)
            yield from _leaves(entry, key)
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(entry, f"{path}.{key}" if path else str(key))
    elif isinstance(value, tuple | list):
        for place, entry in enumerate(value):
            yield from _leaves(entry, f"{path}.{place}")
    else:
        yield path, value
