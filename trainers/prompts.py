"""Prompts: where they come from, and the order in which training draws them.

A source is one of, in this order: `shapes` and `shapes_hard`; a `.txt` file with one prompt a line; a `.jsonl` file
with one object a line; `module:function` or `file.py:function`; a list shipped in `configs/prompts`; a Hugging Face
dataset.
An entry is a text, or a mapping whose key `column` is the text and whose other keys are metadata for the rewards (a
mapping under the key `metadata` is merged into them). For pipelines that edit, the key `image` is the input image: a
file, in a `.jsonl` source relative to that source, or a PIL image from a function.

`PromptStream` draws them in an order that is a pure function of seed and position, so a position is all that a
checkpoint has to remember.
"""

import importlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, cast, get_args

import numpy as np

from ddpo.input_images import IMAGE, InputImageError, check_image, identity
from ddpo.validation import check
from trainers.shipped import PROMPTS

_SHAPES = {"shapes": None, "shapes_hard": ("count", "position", "binding")}
_SHAPES_DEFAULT_LIMIT = 2048


class PromptError(ValueError):
    """A prompt source cannot be used."""


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Where prompts come from.

    Attributes:
        source: A `.txt` file (one prompt a line), a `.jsonl` file, `module:function` or `file.py:function` returning a
            list, `shapes` (captions for the shipped pipeline; `shapes_hard` for counts, positions and two colours), a
            shipped list such as `animals`, or the name of a Hugging Face dataset.
        split: Split of a dataset, of `shapes` (`train`, `heldout`), or of a function that takes one.
        column: Key of the prompt in a dataset, a JSON line or a dict; other keys become metadata for rewards, and
            `image`, a file, is the input image of a pipeline that edits.
        limit: Take the first so many prompts; null takes all.
        shuffle: Draw in a new random order on each pass, else in the order of the source.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    source: str = "shapes"
    split: str = "train"
    column: str = "prompt"
    limit: int | None = None
    shuffle: bool = True

    def __post_init__(self) -> None:
        check(bool(self.source.strip()), "source", self.source, "a file, a function or a dataset name")
        check(self.limit is None or self.limit >= 1, "limit", self.limit, "at least 1 or null")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt.

    Attributes:
        text: What the pipeline is given.
        metadata: What rewards are given besides.
    """

    text: str
    metadata: dict[str, object] = field(default_factory=dict)

    @cached_property
    def group(self) -> str:
        """What tells it from other prompts: the text, and the input image where there is one."""
        return f"{self.text} [{identity(self.metadata[IMAGE])}]" if IMAGE in self.metadata else self.text


def load_prompts(config: PromptConfig) -> list[Prompt]:
    """Reads all prompts of a source.

    Raises:
        PromptError: the source is missing, empty or malformed; the message names it, and the line or entry.
    """
    entries = list(_read(config))
    folder = Path(config.source).expanduser().parent if config.source.endswith(".jsonl") else Path()
    prompts = [_to_prompt(entry, where=where, config=config, folder=folder) for where, entry in entries[: config.limit]]
    if not prompts:
        raise PromptError(f"{config.source}: has no prompts; give at least one")
    return prompts


class PromptStream:
    """Draws prompts without end, a new permutation on each pass.

    Attributes:
        position: Prompts drawn so far; setting it resumes there.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool) -> None:
        if not prompts:
            raise PromptError("a prompt stream needs at least one prompt, got none")
        self.position = 0
        self._prompts = list(prompts)
        self._seed = seed
        self._shuffle = shuffle
        self._order = (-1, np.arange(0))

    def draw(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        drawn = [self._at(self.position + i) for i in range(count)]
        self.position += count
        return drawn

    def _at(self, position: int) -> Prompt:
        turn, place = divmod(position, len(self._prompts))
        if not self._shuffle:
            return self._prompts[place]
        if self._order[0] != turn:
            self._order = (turn, np.random.default_rng([self._seed, turn]).permutation(len(self._prompts)))
        return self._prompts[self._order[1][place]]


# -------------------------------------------------------------------------------------------------------------- sources

Entries = Iterable[tuple[str, object]]
"""Pairs of where an entry stands, for error messages, and the entry."""


def _read(config: PromptConfig) -> Entries:
    source = config.source
    if source in _SHAPES:
        return _from_shapes(config)
    if source.endswith((".txt", ".jsonl")):
        return _from_file(Path(source).expanduser())
    if ":" in source:
        return _from_function(config)
    if (PROMPTS / f"{source}.txt").is_file():
        return _from_file(PROMPTS / f"{source}.txt")
    return _from_dataset(config)


def _from_shapes(config: PromptConfig) -> Entries:
    from rewards.shapes import scene

    if config.split not in get_args(scene.Split):
        raise PromptError(f"{config.source}: split must be train or heldout, got {config.split!r}")
    number = config.limit or _SHAPES_DEFAULT_LIMIT
    split = cast(scene.Split, config.split)
    records = scene.prompts(number, seed=0, categories=_SHAPES[config.source], split=split)
    return _numbered(config.source, "entry", records)


def _from_file(path: Path) -> Entries:
    if not path.is_file():
        raise PromptError(f"{path}: no such prompt file (looked for {path.absolute()})")
    try:
        # Not splitlines(), which also cuts at U+2028 and its like: those are text, in JSON and in a prompt.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    numbered = [(f"{path}: line {number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    return [(where, _json(line, where)) for where, line in numbered] if path.suffix == ".jsonl" else numbered


def _json(line: str, where: str) -> object:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(entry, dict):
        raise PromptError(f'{where}: must be an object such as {{"prompt": "a cat"}}, got {line[:60]}')
    return entry


def _from_function(config: PromptConfig) -> Entries:
    function = _import_function(config.source)
    keywords = {"split": config.split} if "split" in inspect.signature(function).parameters else {}
    try:
        returned = function(**keywords)
    except Exception as error:
        raise PromptError(f"{config.source}: calling it failed with {type(error).__name__}: {error}") from error
    if isinstance(returned, str | Mapping) or not isinstance(returned, Iterable):
        raise PromptError(f"{config.source}: must return a list of texts or dicts, got {type(returned).__name__}")
    return _numbered(config.source, "entry", returned)


def _import_function(source: str) -> Callable[..., object]:
    from rewards.loading import load_file

    name, _, attribute = source.rpartition(":")
    try:
        module = load_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
    except (ImportError, ValueError, TypeError) as error:
        raise PromptError(f"{source}: cannot be imported: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise PromptError(f"{source}: {name} has no function {attribute!r}")
    return function


def _from_dataset(config: PromptConfig) -> Entries:
    name = config.source
    try:
        import datasets
    except ImportError as error:
        shipped = ", ".join(sorted(path.stem for path in PROMPTS.glob("*.txt")))
        raise PromptError(
            f"{name}: taken for a Hugging Face dataset, which needs the package datasets: pip install 'ddpo[datasets]' "
            f"(other sources: a .txt or .jsonl file, module:function, shapes, {shipped})"
        ) from error
    try:
        data = datasets.load_dataset(name, split=config.split)
    except Exception as error:  # the hub, the cache and a dataset's own files each raise their own
        reason = " ".join(str(error).split())
        raise PromptError(
            f"{name}: cannot be loaded as a Hugging Face dataset, split {config.split!r}: {reason}"
        ) from error
    if config.column not in data.column_names:
        raise PromptError(f"{name}: has no column {config.column!r}; columns: {', '.join(data.column_names)}")
    simple = [key for key, feature in data.features.items() if isinstance(feature, datasets.Value)]
    return _numbered(name, "row", data.select_columns(sorted({*simple, config.column})))


def _numbered(source: str, unit: str, entries: Iterable[object]) -> Entries:
    return [(f"{source}: {unit} {number}", entry) for number, entry in enumerate(entries)]


def _to_prompt(entry: object, *, where: str, config: PromptConfig, folder: Path) -> Prompt:
    if isinstance(entry, str):
        entry = {config.column: entry}
    if not isinstance(entry, Mapping):
        raise PromptError(f"{where}: must be a text or a dict, got {type(entry).__name__}")
    if config.column not in entry:
        raise PromptError(f"{where}: has no key {config.column!r}; keys: {', '.join(map(str, entry)) or 'none'}")
    text = entry[config.column]
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"{where}: {config.column!r} must be a text that is not blank, got {text!r}")
    nested = entry.get("metadata") or {}
    if not isinstance(nested, Mapping):
        raise PromptError(f"{where}: 'metadata' must be a mapping, got {nested!r}")
    others = {key: value for key, value in entry.items() if key not in (config.column, "metadata")}
    metadata = {**others, **nested}
    if IMAGE in metadata:
        metadata[IMAGE] = _input_image(metadata[IMAGE], where=where, folder=folder)
    return Prompt(text=text, metadata=metadata)


def _input_image(source: object, *, where: str, folder: Path) -> object:
    """The image as it is, or the absolute path of a file that can be read, from `folder` on."""
    if isinstance(source, str | Path):
        source = str((folder / Path(source).expanduser()).absolute())
    try:
        check_image(source)
    except InputImageError as error:
        raise PromptError(f"{where}: {IMAGE!r}: {error}") from error
    return source
