"""Reads the types of `Config`: which keys exist, what a key holds, which kinds a union offers.

Three readers share it: error messages (the nearest valid key), command-line overrides (text stays text) and the
reference that `ddpo train --help` prints.
"""

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Literal, get_args, get_origin

from trainers.config import Config

Hint = object
"""A type annotation."""


def fields_of(hint: Hint) -> dict[str, Hint]:
    """Keys of a group with their annotations; empty when `hint` is not a configuration class."""
    if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        return {}
    hints = typing.get_type_hints(hint, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(hint)}


def plain(hint: Hint) -> Hint:
    """The annotation without `Annotated` and without `| None`."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    members = [member for member in union(hint) if member is not type(None)]
    return plain(members[0]) if len(members) == 1 and len(union(hint)) == 2 else hint


def union(hint: Hint) -> tuple[Hint, ...]:
    """Members of a union, without `Annotated`; empty for any other annotation."""
    if get_origin(hint) not in (types.UnionType, typing.Union):
        return ()
    return tuple(plain(member) for member in get_args(hint))


def is_optional(hint: Hint) -> bool:
    """Whether null is a value."""
    return type(None) in union(get_args(hint)[0] if get_origin(hint) is Annotated else hint)


def kinds_of(hint: Hint) -> dict[str, type]:
    """Classes of a union by their `kind`, the default one first; empty for any other annotation."""
    members = [member for member in union(plain(hint)) if isinstance(member, type) and dataclasses.is_dataclass(member)]
    return {get_args(fields_of(member)["kind"])[0]: member for member in members}


def declared(group: Hint) -> tuple[dataclasses.Field, ...]:
    """Fields of a group, in order; empty when `group` is not a configuration class."""
    return dataclasses.fields(group) if isinstance(group, type) and dataclasses.is_dataclass(group) else ()


def default_of(field: dataclasses.Field) -> object:
    """A field's default value, or `dataclasses.MISSING`."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def element_of(hint: Hint) -> Hint:
    """What a list holds; `object` for anything else."""
    return get_args(hint)[0] if get_origin(hint) is tuple else object


def locate(location: Sequence[int | str]) -> tuple[str, Hint]:
    """Follows a pydantic error location, in which the kind of a union is a step of its own.

    Returns:
        The dotted key as a user writes it, and its annotation (`object` where no key is declared).
    """
    path: list[str] = []
    hint: Hint = Config
    for part in location:
        choices = kinds_of(hint)
        if choices and part in choices:
            hint = choices[str(part)]
            continue
        path.append(str(part))
        hint = plain(hint)
        hint = element_of(hint) if isinstance(part, int) else fields_of(hint).get(part, object)
    return ".".join(path), plain(hint)


def hint_at(key: str, data: object) -> Hint:
    """Annotation of a dotted key, choosing members of unions by the `kind` written in `data`, else the first one."""
    hint: Hint = Config
    for part in key.split("."):
        if choices := kinds_of(hint):
            kind = data.get("kind") if isinstance(data, dict) else None
            hint = choices.get(str(kind), next(iter(choices.values())))
        hint = element_of(plain(hint)) if part.isdecimal() else fields_of(plain(hint)).get(part, object)
        data = _entry(data, part)
    return hint


def entry_at(data: object, key: str) -> object:
    """What stands under a dotted key of nested mappings and lists; None where nothing does."""
    for part in key.split("."):
        data = _entry(data, part)
    return data


def _entry(data: object, part: str) -> object:
    if isinstance(data, list):
        return data[int(part)] if part.isdecimal() and int(part) < len(data) else None
    return data.get(part) if isinstance(data, dict) else None


def words(hint: Hint) -> tuple[str, ...]:
    """The words a `Literal` allows; empty for any other annotation."""
    return tuple(map(str, get_args(plain(hint)))) if get_origin(plain(hint)) is Literal else ()
