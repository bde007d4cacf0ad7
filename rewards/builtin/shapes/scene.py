"""Scenes of coloured shapes and their captions: the grammar of the toy domain.

A scene is one or two groups of equal objects, with an optional relation between two single objects. Captions and
scenes are in one-to-one correspondence: `parse(caption(scene)) == scene`.

    caption  = group | group " and " group | group " " relation " " group
    group    = number [" " color] " " shape ["s"]          number in a, two, three, four
    relation = above | below | left of | right of          both groups are single objects

A group without a color may have any colors. The categories are those of GenEval (Ghosh et al. 2023):

    single    a circle                       count      three red circles, four crosses
    two       a circle and a square          position   a blue square above a green triangle
    color     a red circle                   binding    a purple cross and two yellow circles
"""

from dataclasses import dataclass
from typing import Literal, TypedDict
from zlib import crc32

import numpy as np

from rewards.base import UserError

NUMBERS = ("a", "two", "three", "four")
COLORS = ("red", "yellow", "green", "cyan", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("above", "below", "left of", "right of")
CATEGORIES = ("single", "two", "count", "color", "position", "binding")
MAX_OBJECTS = 4
EXAMPLE = "a blue square above a green triangle"

Split = Literal["train", "heldout"]

_CATEGORY_WEIGHTS = (0.06, 0.1, 0.22, 0.12, 0.24, 0.26)
_HELDOUT_ONE_IN = 8
_HELDOUT_SALT = 24


class PromptRecord(TypedDict):
    """A caption and, under `metadata["category"]`, the name of its category."""

    prompt: str
    metadata: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Equal objects.

    Attributes:
        count: Number of objects, 1 to 4.
        shape: One of `SHAPES`.
        color: One of `COLORS`, or None where the caption leaves the colors free.
    """

    count: int
    shape: str
    color: str | None = None

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: If a field is not of the grammar.
        """
        if not 1 <= self.count <= MAX_OBJECTS:
            raise ValueError(f"Group.count is {self.count}: choose 1 to {MAX_OBJECTS}.")
        if self.shape not in SHAPES:
            raise ValueError(f"Group.shape is {self.shape!r}: choose one of {', '.join(SHAPES)}.")
        if self.color is not None and self.color not in COLORS:
            raise ValueError(f"Group.color is {self.color!r}: choose one of {', '.join(COLORS)}, or None.")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a caption asks for, and nothing else may be in the picture.

    Attributes:
        groups: One or two groups, different from each other, `MAX_OBJECTS` objects in all at most.
        relation: Where the first object lies as seen from the second; one of `RELATIONS`, or None.
    """

    groups: tuple[Group, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        """Checks that the scene has a caption.

        Raises:
            UserError: If the scene cannot be said in the grammar or drawn.
        """
        if not 1 <= len(self.groups) <= 2:
            raise ValueError(f"Scene has {len(self.groups)} groups: give one or two.")
        if self.num_objects > MAX_OBJECTS:
            raise ValueError(f"Scene has {self.num_objects} objects: give {MAX_OBJECTS} at most.")
        if len(self.groups) == 2:
            self._check_pair(*self.groups)
        if self.relation is None:
            return
        if self.relation not in RELATIONS:
            raise ValueError(f"Scene.relation is {self.relation!r}: choose one of {', '.join(RELATIONS)}, or None.")
        if [group.count for group in self.groups] != [1, 1] or self.groups[0].color is None:
            raise ValueError(f"Scene.relation {self.relation!r} needs two single coloured objects, as in {EXAMPLE!r}.")

    @staticmethod
    def _check_pair(first: Group, second: Group) -> None:
        if (first.color is None) != (second.color is None):
            raise ValueError(
                f"Scene mixes a group with and one without a color ({first}, {second}): give both or none."
            )
        if first.color is None and (first.count > 1 or second.count > 1):
            raise ValueError(f"Scene has two groups without colors ({first}, {second}): each must be a single object.")
        if (first.shape, first.color) == (second.shape, second.color):
            raise ValueError(f"Scene names the same kind twice ({first}, {second}): join them into one group.")

    @property
    def num_objects(self) -> int:
        """The number of objects in the picture."""
        return sum(group.count for group in self.groups)


def category(scene: Scene) -> str:
    """Returns the one of `CATEGORIES` that a scene belongs to."""
    first = scene.groups[0]
    if scene.relation is not None:
        return "position"
    if len(scene.groups) == 2:
        return "two" if first.color is None else "binding"
    if first.count > 1:
        return "count"
    return "single" if first.color is None else "color"


def caption(scene: Scene) -> str:
    """Says a scene in words."""
    phrases = [_phrase(group) for group in scene.groups]
    return f" {scene.relation or 'and'} ".join(phrases)


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _phrase(group: Group) -> str:
    noun = group.shape if group.count == 1 else _plural(group.shape)
    words = (NUMBERS[group.count - 1], group.color, noun)
    return " ".join(word for word in words if word is not None)


_NOUNS = {shape: (shape, False) for shape in SHAPES} | {_plural(shape): (shape, True) for shape in SHAPES}
VOCABULARY = tuple(dict.fromkeys((*NUMBERS, *COLORS, *_NOUNS, "and", *" ".join(RELATIONS).split())))


def parse(text: str) -> Scene:
    """Reads a caption back; the exact inverse of `caption`.

    Args:
        text: A caption of the grammar, in lower case, words separated by single spaces.

    Returns:
        The scene.

    Raises:
        UserError: If the text is not a caption of the grammar.
    """
    for joint in ("and", *RELATIONS):
        first, found, second = text.partition(f" {joint} ")
        if found:
            relation = None if joint == "and" else joint
            return _scene((_group(first, text), _group(second, text)), relation, text)
    return _scene((_group(text, text),), None, text)


def _scene(groups: tuple[Group, ...], relation: str | None, text: str) -> Scene:
    try:
        return Scene(groups=groups, relation=relation)
    except ValueError as error:
        raise UserError(f"Not a caption of the shapes domain: {text!r}. {error} A valid one: {EXAMPLE!r}.") from error


def _group(phrase: str, text: str) -> Group:
    words = phrase.split(" ")
    color = words[1] if len(words) == 3 else None
    shape, is_plural = _NOUNS.get(words[-1], ("", False))
    is_valid = len(words) in (2, 3) and words[0] in NUMBERS and shape and (color is None or color in COLORS)
    if not is_valid or is_plural != (words[0] != "a"):
        raise UserError(
            f"Not a caption of the shapes domain: {text!r} (at {phrase!r}). A valid one: {EXAMPLE!r}. "
            f"Numbers: {', '.join(NUMBERS)}; colors: {', '.join(COLORS)}; shapes: {', '.join(SHAPES)}."
        )
    return Group(count=NUMBERS.index(words[0]) + 1, shape=shape, color=color)


def sample_scene(rng: np.random.Generator, category: str | None = None) -> Scene:
    """Draws a scene.

    Args:
        rng: Source of randomness.
        category: One of `CATEGORIES`; None draws one, the harder ones more often.

    Returns:
        A scene of that category, uniform over its kinds and counts.

    Raises:
        UserError: If the category is unknown.
    """
    if category is None:
        category = CATEGORIES[rng.choice(len(CATEGORIES), p=_CATEGORY_WEIGHTS)]
    if category not in CATEGORIES:
        raise UserError(f"category is {category!r}: choose one of {', '.join(CATEGORIES)}.")
    colored = category not in ("single", "two") and not (category == "count" and rng.random() < 0.2)
    if category in ("single", "color", "count"):
        count = int(rng.integers(2, MAX_OBJECTS + 1)) if category == "count" else 1
        return Scene(groups=(_kind(rng, count, colored=colored),))
    counts = (1, 1)
    if category == "binding":
        counts = ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2))[rng.integers(6)]
    first, second = (_kind(rng, count, colored=colored) for count in counts)
    while (first.shape, first.color) == (second.shape, second.color):
        second = _kind(rng, counts[1], colored=colored)
    relation = RELATIONS[rng.integers(len(RELATIONS))] if category == "position" else None
    return Scene(groups=(first, second), relation=relation)


def _kind(rng: np.random.Generator, count: int, *, colored: bool) -> Group:
    color = COLORS[rng.integers(len(COLORS))] if colored else None
    return Group(count=count, shape=SHAPES[rng.integers(len(SHAPES))], color=color)


def split_of(text: str) -> Split:
    """Returns the side of the fixed split a caption is on: one in eight, by CRC-32 with a salt, is held out.

    The salt is such that the held-out side has captions of every category, even of those with four.
    """
    return "heldout" if crc32(f"{_HELDOUT_SALT} {text}".encode()) % _HELDOUT_ONE_IN == 0 else "train"


def prompts(
    num: int, *, seed: int, categories: tuple[str, ...] | None = None, split: Split | None = None
) -> list[PromptRecord]:
    """Draws prompts for training or evaluation.

    Args:
        num: Number of prompts; captions may repeat.
        seed: The same seed gives the same prompts.
        categories: Draw from these in equal parts, in turn; None draws as `sample_scene` does.
        split: Keep only the captions of this side of the split; None keeps all.

    Returns:
        `num` records `{"prompt": caption, "metadata": {"category": name}}`.

    Raises:
        UserError: If `split` or a category is unknown.
    """
    if split not in (None, "train", "heldout"):
        raise UserError(f"split is {split!r}: choose 'train', 'heldout' or None.")
    rng = np.random.default_rng(seed)
    records: list[PromptRecord] = []
    while len(records) < num:
        name = None if categories is None else categories[len(records) % len(categories)]
        scene = sample_scene(rng, name)
        text = caption(scene)
        if split is None or split_of(text) == split:
            records.append({"prompt": text, "metadata": {"category": category(scene)}})
    return records
