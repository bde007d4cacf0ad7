"""Turns what pydantic reports into one line per problem: source, dotted key, what it must be, what was received."""

from collections.abc import Sequence

from pydantic_core import ErrorDetails

from ddpo.validation import UserError
from rewards.nearest import nearest
from trainers.config.schema import fields_of, kinds_of, locate, plain, words
from trainers.config.synonyms import elsewhere

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


class ConfigError(UserError):
    """A configuration cannot be used; the message has one line per problem."""


def show(value: object) -> str:
    """A value as a user wrote it, shortened."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def guess(word: str, valid: Sequence[str]) -> str:
    """` (did you mean 'weight'?)`, or nothing."""
    close = nearest(word, valid, most=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def guess_key(key: str, group: Sequence[str]) -> str:
    """What an unknown dotted key may mean: in its group, elsewhere, or by another trainer's word; else its choices."""
    word = key.rpartition(".")[2]
    other = "" if nearest(word, group, most=1, alike=0.75) else elsewhere(key)
    if other:
        return f" (did you mean {other!r}?)"
    return guess(word, group) or (f" (valid: {', '.join(group)})" if group else "")


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
            hinted = guess(received, words(hint)) if isinstance(received, str) else ""
            return key, f"must be {either(words(hint))}, got {show(received)}{hinted}"
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
    unknown = _below(key, str(name))
    return unknown, f"unknown key{guess_key(unknown, _keys(hint))}"


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
