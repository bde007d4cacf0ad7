"""Pictures with prompts: a folder with `metadata.jsonl`, the format of Hugging Face image folders.

{"file_name": "003.png", "prompt": "a red circle"}          the prompt may also be called `text`
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rewards.base import UserError

METADATA = "metadata.jsonl"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture file and what it was made for.

    Attributes:
        prompt: The text.
        path: The file.
    """

    prompt: str
    path: Path


def read_pictures(folder: Path) -> list[Picture]:
    """The pictures of a folder.

    Raises:
        UserError: No metadata in it, or a malformed line, named with its number.
    """
    path = folder / METADATA
    if not path.is_file():
        raise UserError(
            f"{folder} has no {METADATA}; write one with a line for each picture such as "
            f'{{"file_name": "003.png", "prompt": "a red circle"}}'
        )
    pictures = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                pictures.append(_picture(line, folder))
            except ValueError as error:
                raise UserError(f"{path}: line {number}: {error}") from error
    return pictures


def write_metadata(folder: Path, pictures: Sequence[Picture]) -> None:
    """Writes `metadata.jsonl` for pictures that lie in `folder`."""
    lines = [json.dumps({"file_name": p.path.relative_to(folder).as_posix(), "prompt": p.prompt}) for p in pictures]
    (folder / METADATA).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def parse_object(line: str, *, wanted: str) -> dict[str, object]:
    """A JSON line.

    Args:
        line: Its text.
        wanted: What it must be, for the message.

    Raises:
        UserError: It is no JSON, or no object.
    """
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"is not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets without end
        raise UserError(f"is JSON that cannot be read: {error}") from error
    if not isinstance(entry, dict):
        raise UserError(f"must be {wanted}, got {line[:60]}")
    return entry


def _picture(line: str, folder: Path) -> Picture:
    entry = parse_object(line, wanted="an object")
    prompt, name = entry.get("prompt", entry.get("text")), entry.get("file_name")
    if not isinstance(prompt, str) or not isinstance(name, str):
        raise UserError(f"needs the texts 'file_name' and 'prompt', got the keys {', '.join(entry) or 'none'}")
    if not (folder / name).is_file():
        raise UserError(f"there is no picture {folder / name}")
    return Picture(prompt=prompt, path=folder / name)
