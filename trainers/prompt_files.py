"""Files of prompts: the entries in them, each with the place where it stands.

    .txt, .jsonl          an entry a line: a text, or an object; lines that begin with `# ` are comments
    .json                 a list of texts or objects
    .csv, .tsv, .parquet  a table, read by the package datasets: an entry a row, its columns by name

Endings may be in capitals.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ddpo.validation import UserError

if TYPE_CHECKING:  # an extra
    from datasets import Dataset

Entries = list[tuple[str, object]]
"""Pairs of where an entry stands, for error messages, and the entry."""

_TABLES: dict[str, tuple[str, dict[str, str]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
}
SUFFIXES = (".txt", ".jsonl", ".json", *_TABLES)


class PromptError(UserError):
    """A prompt source cannot be used."""


def is_file_name(source: str) -> bool:
    """Whether a source is named like a file of prompts."""
    return source.lower().endswith(SUFFIXES)


def read_file(path: Path) -> Entries:
    """The entries of a file.

    Raises:
        PromptError: The file is missing or malformed; the message names it, and the line and column where it can.
    """
    if not path.is_file():
        raise PromptError(f"{path}: no such prompt file (looked for {path.absolute()})")
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        return _from_table(path, *_TABLES[suffix])
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if suffix == ".json":
        return _from_list(text, path)
    lines = list(_lines(text, path))
    return [(where, _object(line, where)) for where, line in lines] if suffix == ".jsonl" else list(lines)


def no_datasets(name: str, more: str = "") -> PromptError:
    """What to say where the package datasets is missing, and something needs it."""
    return PromptError(f"{name}: needs the package datasets: pip install 'ddpo[datasets]'{more}")


def open_dataset(name: str, split: str, *, others: str, error: type[UserError], nor: str = "") -> "Dataset":
    """A split of a Hugging Face dataset.

    Args:
        name: Of the dataset.
        split: Of it.
        others: What else the source could be, said where the package is missing.
        error: Its kind where the dataset cannot be loaded.
        nor: What else the name is not.

    Raises:
        PromptError: The package datasets is missing.
    """
    try:
        import datasets
    except ImportError as missing:
        raise no_datasets(f"{name}, taken for a Hugging Face dataset", others) from missing
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as failure:  # the hub, the cache and a dataset's own files each raise their own
        reason = " ".join(str(failure).split())
        raise error(f"{name}: cannot be loaded as a Hugging Face dataset, split {split!r}{nor}: {reason}") from failure


def _lines(text: str, path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), 1):  # other ends of lines, as U+2028, may stand in a text
        stripped = line.strip()
        if stripped and stripped != "#" and not stripped.startswith("# "):
            yield f"{path}: line {number}", stripped


def _object(line: str, where: str) -> object:
    entry = _json(line, where)
    if not isinstance(entry, dict):
        raise PromptError(f'{where}: must be an object such as {{"prompt": "a cat"}}, got {line[:60]}')
    return entry


def _from_list(text: str, path: Path) -> Entries:
    entries = _json(text, str(path))
    if not isinstance(entries, list):
        raise PromptError(
            f'{path}: must be a list such as ["a cat", {{"prompt": "a dog"}}], got {text.strip()[:60]}; one object a '
            f"line goes into a .jsonl file"
        )
    return [(f"{path}: entry {number}", entry) for number, entry in enumerate(entries)]


def _json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise PromptError(f"{where}: not JSON: {error.msg} at {line}column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets without end
        raise PromptError(f"{where}: JSON that cannot be read: {str(error).partition(';')[0]}") from error


def _from_table(path: Path, kind: str, options: Mapping[str, str]) -> Entries:
    try:
        import datasets
    except ImportError as error:
        raise no_datasets(str(path), " (or write a .jsonl file, an object a line)") from error
    try:
        rows = datasets.load_dataset(kind, data_files=str(path), split="train", **options)
    except Exception as error:  # each reader raises its own
        cause = error.__cause__ or error
        raise PromptError(f"{path}: cannot be read as a {kind} table: {' '.join(str(cause).split())}") from error
    return [(f"{path}: row {number}", row) for number, row in enumerate(rows)]
