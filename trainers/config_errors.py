"""Turns what pydantic reports into one line per problem: source, dotted key, what it must be, what was received."""

import difflib
from collections.abc import Sequence

from pydantic_core import ErrorDetails

from trainers.config_schema import fields_of, kinds_of, locate, plain, words

_EXPECTED = {
    "bool_type": "true or false",
    "dataclass_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "string_type": "text",
    "tuple_type": "a list",
}


class ConfigError(ValueError):
    """A configuration cannot be used; the message has one line per problem."""


def show(value: object) -> str:
    """A value as a user wrote it, shortened."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(word: str, valid: Sequence[str]) -> str:
    """` (did you mean 'weight'?)`, or the choices when they are few, or nothing."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (valid: {', '.join(valid)})" if valid else ""


def explain(error: ErrorDetails) -> tuple[str, str]:
    """The dotted key (empty for the whole file) and the sentence for one pydantic error."""
    key, hint = locate(error["loc"])
    received = error["input"]
    match error["type"]:
        case "unexpected_keyword_argument":
            return _unknown_key(error)
        case "missing":
            return key, "missing key"
        case "literal_error":
            guess = nearest(str(received), words(hint)) if isinstance(received, str) else ""
            guess = guess if "did you mean" in guess else ""
            return key, f"must be {either(words(hint))}, got {show(received)}{guess}"
        case "union_tag_invalid":
            kind = received["kind"] if isinstance(received, dict) else getattr(received, "kind", None)
            return _below(key, "kind"), f"must be {either(list(kinds_of(hint)))}, got {show(kind)}"
        case "union_tag_not_found":
            return key, f"must be a mapping of keys, got {show(received)}"
        case "value_error":
            return _refused(key, hint, error["ctx"]["error"])
        case kind if kind in _EXPECTED:
            return key, f"must be {_EXPECTED[kind]}, got {show(received)}"
    return key, f"{error['msg']}, got {show(received)}"


def _unknown_key(error: ErrorDetails) -> tuple[str, str]:
    *group, name = error["loc"]
    key, hint = locate(group)
    return _below(key, str(name)), f"unknown key{nearest(str(name), _keys(hint))}"


def _keys(hint: object) -> list[str]:
    return list(fields_of(plain(hint)))


def _refused(key: str, hint: object, error: ValueError) -> tuple[str, str]:
    """A range check of a dataclass: its message starts with the field's name, dotted when it is a group's."""
    name, _, sentence = str(error).partition(" ")
    declared = name.split(".")[0] in fields_of(hint)
    return (_below(key, name), sentence) if declared else (key, str(error))


def _below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def either(choices: Sequence[str]) -> str:
    """`a, b or c`."""
    return f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else choices[0]
