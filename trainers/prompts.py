"""Prompts: where they come from, and the order in which training draws them.

A source is one of, in this order: `shapes` and `shapes_hard`; a file (`trainers.prompt_files`); `module:function` or
`file.py:function`; a list shipped in `configs/prompts`; a Hugging Face dataset.
An entry is a text, or a mapping whose key `column` is the text and whose other keys are metadata for the rewards (a
mapping under the key `metadata` is merged into them). For pipelines that edit, the key `image` is the input image: a
file, relative to the file that names it, or a PIL image from a function.

`PromptStream` draws them in an order that is a pure function of seed and position, so a position is all that a
checkpoint has to remember.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, cast, get_args

import numpy as np

from ddpo.pipeline.input_images import InputImageError, check_image, identities, sources
from ddpo.seeds import Purpose, one_seed, stream
from ddpo.validation import check, misfit
from trainers.metadata import unsendable
from trainers.prompt_files import SUFFIXES, Entries, PromptError, is_file_name, open_dataset, read_file
from trainers.shipped_configs import PROMPTS

__all__ = ["Prompt", "PromptConfig", "PromptError", "PromptStream", "as_list", "load_prompts", "to_prompt"]

_SHAPES = {"shapes": None, "shapes_hard": ("count", "position", "binding")}
_SHAPES_DEFAULT_LIMIT = 2048
_SHAPES_MOST = 1 << 17  # captions repeat long before, and drawing more takes minutes


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Where prompts come from.

    Attributes:
        source: A file (`.txt` with one prompt a line, `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`), `module:function`
            or `file.py:function` returning a list, `shapes` (captions for the shipped pipeline; `shapes_hard` for
            counts, positions and two colours), a shipped list such as `animals`, or the name of a Hugging Face dataset.
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
        metadata: What rewards are given besides; numbers, at any depth, are finite.

    Raises:
        PromptError: A number of the metadata is not finite.
    """

    text: str
    metadata: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, value in self.metadata.items():
            if (wrong := unsendable(value)) is not None:
                raise PromptError(f"{key!r} {wrong}")

    @cached_property
    def group(self) -> str:
        """What tells it from other prompts: the text, and the input image where there is one."""
        images = identities(self.metadata)
        return f"{self.text} [{images}]" if images else self.text


def load_prompts(config: PromptConfig) -> list[Prompt]:
    """Reads all prompts of a source.

    Raises:
        PromptError: The source is missing, empty or malformed; the message names it, and the line or entry.
    """
    entries = _read(config)
    folder = Path(config.source).expanduser().parent if is_file_name(config.source) else Path()
    prompts = [
        to_prompt(entry, where=where, column=config.column, folder=folder) for where, entry in entries[: config.limit]
    ]
    if not prompts:
        raise PromptError(f"{config.source}: has no prompts; give at least one")
    return prompts


class PromptStream:
    """Draws prompts without end, a new permutation on each pass.

    Attributes:
        entries: All of them.
        position: Prompts drawn so far; setting it resumes there.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool) -> None:
        if not prompts:
            raise PromptError("a prompt stream needs at least one prompt, got none")
        self.position = 0
        self.entries = tuple(prompts)
        self._seed = seed
        self._shuffle = shuffle and len(prompts) > 1
        self._order = (-1, np.arange(0))

    def draw(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        drawn = [self._at(self.position + i) for i in range(count)]
        self.position += count
        return drawn

    def _at(self, position: int) -> Prompt:
        turn, place = divmod(position, len(self.entries))
        if not self._shuffle:
            return self.entries[place]
        if self._order[0] != turn:
            random = stream(one_seed(self._seed, turn, purpose=Purpose.PROMPTS))
            self._order = (turn, random.permutation(len(self.entries)))
        return self.entries[self._order[1][place]]


# -------------------------------------------------------------------------------------------------------------- sources


def _read(config: PromptConfig) -> Entries:
    source = config.source
    if source in _SHAPES:
        return _from_shapes(config)
    if is_file_name(source):
        return read_file(Path(source).expanduser())
    if ":" in source:
        return _from_function(config)
    if (PROMPTS / f"{source}.txt").is_file():
        return read_file(PROMPTS / f"{source}.txt")
    if Path(source).expanduser().is_file():
        raise PromptError(f"{source}: is a file, and of no kind that prompts are read from: {', '.join(SUFFIXES)}")
    return _from_dataset(config)


def _from_shapes(config: PromptConfig) -> Entries:
    from rewards.builtin.shapes import scene

    if config.split not in get_args(scene.Split):
        raise PromptError(f"{config.source}: split must be train or heldout, got {config.split!r}")
    number = config.limit or _SHAPES_DEFAULT_LIMIT
    if number > _SHAPES_MOST:
        raise PromptError(f"{config.source}: limit must be at most {_SHAPES_MOST:,}, got {number:,}")
    split = cast(scene.Split, config.split)
    records = scene.prompts(number, seed=0, categories=_SHAPES[config.source], split=split)
    return _numbered(config.source, "entry", records)


def _from_function(config: PromptConfig) -> Entries:
    function = _import_function(config.source)
    keywords = {"split": config.split} if "split" in inspect.signature(function).parameters else {}
    try:
        returned = function(**keywords)
    except Exception as error:
        raise PromptError(f"{config.source}: calling it failed with {type(error).__name__}: {error}") from error
    return _numbered(config.source, "entry", as_list(returned, f"{config.source}: must return"))


def as_list(entries: object, what: str) -> list[object]:
    """Entries that somebody hands over, if they come as a list, or as anything that holds one after another.

    A table would be iterated over by its columns, and a text by its letters.

    Args:
        entries: What is handed over.
        what: Beginning of the message.

    Raises:
        PromptError: They come as something else.
    """
    if isinstance(entries, Sequence | Set | Iterator) and not isinstance(entries, str | bytes):
        return list(entries)
    cure = next((f"; end with {method}" for name, method in _TO_LIST.items() if hasattr(entries, name)), "")
    raise PromptError(f"{what} a list of texts or dicts, got {type(entries).__name__}{cure}")


_TO_LIST = {"to_dict": ".to_dict('records')", "to_dicts": ".to_dicts()", "tolist": ".tolist()", "features": "list(...)"}
"""How a table or an array becomes a list, by what it has: of pandas, polars, numpy, datasets."""


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
    shipped = ", ".join(sorted(path.stem for path in PROMPTS.glob("*.txt")))
    others = f" (other sources: a .txt or .jsonl file, module:function, shapes, {shipped})"
    data = open_dataset(name, config.split, others=others, error=PromptError)
    if config.column not in data.column_names:
        raise PromptError(f"{name}: has no column {config.column!r}; columns: {', '.join(data.column_names)}")
    from datasets import Value

    simple = [key for key, feature in data.features.items() if isinstance(feature, Value)]
    return _numbered(name, "row", data.select_columns(sorted({*simple, config.column})))


def _numbered(source: str, unit: str, entries: Iterable[object]) -> Entries:
    return [(f"{source}: {unit} {number}", entry) for number, entry in enumerate(entries)]


def to_prompt(entry: object, *, where: str, column: str = "prompt", folder: Path = Path()) -> Prompt:
    """A prompt from a text or a mapping.

    Args:
        entry: The text or mapping.
        where: Where it stands, for messages.
        column: The mapping's key of the text.
        folder: Where relative paths of images start.

    Raises:
        PromptError: It is something else, has no text, a number that is not finite, or an image that cannot be read.
    """
    if isinstance(entry, str):
        entry = {column: entry}
    if not isinstance(entry, Mapping):
        raise PromptError(f"{where}: must be a text or a dict, got {type(entry).__name__}")
    if column not in entry:
        raise PromptError(f"{where}: has no key {column!r}; keys: {', '.join(map(str, entry)) or 'none'}")
    text = entry[column]
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"{where}: {column!r} must be a text that is not blank, got {text!r:.80}")
    nested = entry.get("metadata") or {}
    if not isinstance(nested, Mapping):
        raise PromptError(f"{where}: 'metadata' must be a mapping, got {nested!r}")
    others = {key: value for key, value in entry.items() if key not in (column, "metadata")}
    metadata = {**others, **nested}
    for key, value in {column: text, **metadata}.items():
        if isinstance(value, str) and (wrong := misfit(value)):
            raise PromptError(f"{where}: {key!r} must be text without {wrong}")
    for name, source in sources(metadata).items():
        metadata[name] = _input_image(source, where=f"{where}: {name!r}", folder=folder)
    try:
        return Prompt(text=text, metadata=metadata)
    except PromptError as error:
        raise PromptError(f"{where}: {error}") from error


def _input_image(source: object, *, where: str, folder: Path) -> object:
    """The image itself, or the absolute path of a readable file; relative paths start from `folder`."""
    if isinstance(source, str) and "://" in source:
        raise PromptError(f"{where} must be a file on this machine, got {source!r}; download it first")
    if isinstance(source, str | Path):
        source = str((folder / Path(source).expanduser()).absolute())
    try:
        check_image(source)
    except InputImageError as error:
        raise PromptError(f"{where}: {error}") from error
    return source
