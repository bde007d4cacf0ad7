"""Pictures with prompts: a folder with `metadata.jsonl`, the format of Hugging Face image folders.

{"file_name": "003.png", "prompt": "a red circle"}          the prompt may also be called `text`
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

METADATA = "metadata.jsonl"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture file and what it was made for.

    Attributes:
        prompt: the text.
        path: the file.
    """

    prompt: str
    path: Path


def read_pictures(folder: Path) -> list[Picture]:
    """The pictures of a folder.

    Raises:
        ValueError: no metadata in it, or a malformed line, named with its number.
    """
    path = folder / METADATA
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {METADATA}; write one with a line for each picture such as "
            f'{{"file_name": "003.png", "prompt": "a red circle"}}'
        )
    pictures = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                pictures.append(_picture(line, folder))
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: {error}") from error
    return pictures


def write_metadata(folder: Path, pictures: Sequence[Picture]) -> None:
    """Write `metadata.jsonl` for pictures that lie in `folder`."""
    lines = [json.dumps({"file_name": p.path.relative_to(folder).as_posix(), "prompt": p.prompt}) for p in pictures]
    (folder / METADATA).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def parse_object(line: str, *, wanted: str) -> dict[str, object]:
    """A JSON line.

    Args:
        line: its text.
        wanted: what it must be, for the message.

    Raises:
        ValueError: it is no JSON, or no object.
    """
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"must be {wanted}, got {line[:60]}")
    return entry


def _picture(line: str, folder: Path) -> Picture:
    entry = parse_object(line, wanted="an object")
    prompt, name = entry.get("prompt", entry.get("text")), entry.get("file_name")
    if not isinstance(prompt, str) or not isinstance(name, str):
        raise ValueError(f"needs the texts 'file_name' and 'prompt', got the keys {', '.join(entry) or 'none'}")
    if not (folder / name).is_file():
        raise ValueError(f"there is no picture {folder / name}")
    return Picture(prompt=prompt, path=folder / name)
