"""What a GenEval prompt asks for, read from the official metadata.

    {"tag": "position", "include": [{"class": "dog", "count": 1},
                                    {"class": "cat", "count": 1, "position": ["left of", 0]}], "prompt": "..."}

`include` clauses must all hold, of `exclude` clauses none may: as many objects of the class, or more. A position refers
to the objects of an earlier `include` clause by its number. A line of `evaluation_metadata.jsonl` is such metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from rewards.base import UserError

Color = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
Relation = Literal["left of", "right of", "above", "below"]
COLORS: tuple[Color, ...] = get_args(Color)
RELATIONS: tuple[Relation, ...] = get_args(Relation)


@dataclass(frozen=True, kw_only=True)
class Clause:
    """A number of objects.

    Attributes:
        kind: Name of their class, such as `potted plant`.
        count: How many, at least 1.
        color: What they must look like; None = any.
        relation: Where they must be; None = anywhere.
        target: Number of the clause whose objects `relation` refers to.
    """

    kind: str
    count: int
    color: Color | None = None
    relation: Relation | None = None
    target: int = 0


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a picture must show.

    Attributes:
        tag: Kind of prompt, such as `counting`.
        include: What must be there.
        exclude: What must not be there.
    """

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every class that is named, once, sorted."""
        return tuple(sorted({clause.kind for clause in (*self.include, *self.exclude)}))


def parse_spec(metadata: Mapping[str, object]) -> Spec:
    """Reads the metadata of a prompt.

    Raises:
        UserError: It is not GenEval's; the message says what is missing or wrong.
    """
    if "include" not in metadata:
        raise UserError(
            f"reward 'geneval' needs GenEval metadata with the key include, got the keys "
            f"{', '.join(map(str, metadata)) or 'none'}; use evaluation_metadata.jsonl of GenEval as prompt source, or "
            f'give each prompt "include": [{{"class": "dog", "count": 2}}]'
        )
    include = tuple(_clause(entry, place, "include") for place, entry in enumerate(_list(metadata, "include")))
    exclude = tuple(_clause(entry, place, "exclude") for place, entry in enumerate(_list(metadata, "exclude")))
    if not include and not exclude:
        raise UserError("reward 'geneval': include and exclude are both empty, so every picture would be right")
    return Spec(tag=str(metadata.get("tag", "")), include=include, exclude=exclude)


def _list(metadata: Mapping[str, object], key: str) -> list[object]:
    value = metadata.get(key) or []
    if not isinstance(value, list | tuple):
        raise UserError(f"reward 'geneval': {key} must be a list of objects, got {value!r}")
    return list(value)


def _clause(entry: object, place: int, group: str) -> Clause:
    where = f"reward 'geneval': {group}[{place}]"
    if not isinstance(entry, Mapping):
        raise UserError(f'{where} must be an object such as {{"class": "dog", "count": 1}}, got {entry!r}')
    unknown = set(entry) - {"class", "count", "color", "position"}
    if unknown:
        raise UserError(
            f"{where} has the unknown key {sorted(map(str, unknown))[0]!r}; known: class, count, color, position"
        )
    kind, count, color = entry.get("class"), entry.get("count"), entry.get("color")
    if not (isinstance(kind, str) and kind.strip()):
        raise UserError(f"{where}: class must be a name, got {kind!r}")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"{where}: count must be a whole number, at least 1, got {count!r}")
    if color is not None and color not in COLORS:
        raise UserError(f"{where}: color must be one of {', '.join(COLORS)}, got {color!r}")
    relation, target = _position(entry.get("position"), place if group == "include" else 0, where)
    return Clause(kind=kind.strip(), count=count, color=cast(Color | None, color), relation=relation, target=target)


def _position(value: object, earlier: int, where: str) -> tuple[Relation | None, int]:
    if value is None:
        return None, 0
    if isinstance(value, list | tuple) and len(value) == 2:
        relation, target = value
        if relation in RELATIONS and isinstance(target, int) and 0 <= target < earlier:
            return cast(Relation, relation), target
    raise UserError(
        f"{where}: position must be [relation, number of an earlier include clause], relation one of "
        f"{', '.join(RELATIONS)}, got {value!r}"
    )
