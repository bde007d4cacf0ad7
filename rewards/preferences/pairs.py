"""Pairs of pictures of one prompt, labelled or not, as JSON lines beside the pictures.

    {"prompt": "a red circle", "a": "003.png", "b": "017.png", "label": 1}

`label` is 1 where a is preferred, 0 where b is, 0.5 for a tie; absent or null before anybody looked. Paths are relative
to the file. Other keys are kept by nobody and allowed; a line with `"skipped": true` has no label and is passed over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from rewards.base import UserError
from rewards.preferences.pictures import parse_object

_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two pictures of one prompt.

    Attributes:
        prompt: What both show.
        a: Picture file.
        b: Another picture file.
        label: 1 where a is preferred, 0 where b is, 0.5 for a tie, None without a label.
    """

    prompt: str
    a: Path
    b: Path
    label: float | None = None

    @property
    def key(self) -> tuple[str, frozenset[Path]]:
        """The same for (a, b) and (b, a), and however the files are named."""
        return self.prompt, frozenset((self.a.resolve(), self.b.resolve()))


def read_pairs(path: Path, *, labelled: bool) -> list[Pair]:
    """Reads a file of pairs.

    Args:
        path: JSON lines.
        labelled: Whether every pair must have a label, but for skipped ones, which are left out.

    Raises:
        UserError: Malformed lines, each named with the file and its number; no pairs; no such file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of pairs")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # others, as U+2028, may stand in a text
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error})") from error
    pairs: list[Pair] = []
    wrong: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            pair = parse_pair(line, folder=path.parent, labelled=labelled)
        except ValueError as error:
            wrong.append(f"{path}: line {number}: {error}")
            continue
        if pair is not None:
            pairs.append(pair)
    if wrong:
        more = [f"{path}: {len(wrong) - _SHOWN} more malformed lines"] if len(wrong) > _SHOWN else []
        raise UserError("\n".join(wrong[:_SHOWN] + more))
    if not pairs:
        raise UserError(f"{path}: has no {'labelled ' if labelled else ''}pairs")
    return pairs


def parse_pair(line: str, *, folder: Path, labelled: bool) -> Pair | None:
    """Reads one line; None for a skipped pair where labels are asked for.

    Raises:
        UserError: What is wrong with it.
    """
    entry = parse_object(line, wanted='an object such as {"prompt": "a cat", "a": "1.png", ...}')
    prompt, label = entry.get("prompt"), entry.get("label")
    if not isinstance(prompt, str):
        raise UserError(f"'prompt' must be a text, got {prompt!r}")
    a, b = (_picture(entry, name, folder) for name in ("a", "b"))
    if a == b:
        raise UserError(f"'a' and 'b' are the same picture {a}")
    if labelled and entry.get("skipped") is True:
        return None
    if label is None and labelled:
        raise UserError("has no 'label'; give 1 (a is better), 0 (b is better) or 0.5 (tie), or leave the line out")
    if label is not None and (isinstance(label, bool) or label not in (0, 0.5, 1)):
        raise UserError(f"'label' must be 1 (a is better), 0 (b is better) or 0.5 (tie), got {label!r}")
    return Pair(prompt=prompt, a=a, b=b, label=None if label is None else float(label))


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Writes pairs, with pictures relative to the file; replaces the file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(as_entry(pair, path.parent)) + "\n" for pair in pairs), encoding="utf-8")
    partial.replace(path)


def as_entry(pair: Pair, folder: Path) -> dict[str, str | float]:
    """What a line of a file in `folder` says of a pair."""
    names = {name: os.path.relpath(file.resolve(), folder.resolve()) for name, file in (("a", pair.a), ("b", pair.b))}
    entry: dict[str, str | float] = {"prompt": pair.prompt, **names}
    return entry if pair.label is None else {**entry, "label": pair.label}


def split_by_prompt(prompts: Sequence[str], shares: Sequence[float], *, seed: int) -> list[int]:
    """Which part each prompt belongs to; all pairs of a prompt share one, so that none is learnt and tested.

    Prompts are ordered by a hash of seed and text, and parts are cut from that order, so that a part holds its share
    of the prompts to rounding.

    Args:
        prompts: A prompt for each pair, repeats expected.
        shares: Of every part but the first, which takes the rest; each part gets at least one prompt.
        seed: Chooses the order.

    Returns:
        For each of `prompts`, the index of its part: 0 the rest, then as in `shares`.

    Raises:
        UserError: Fewer different prompts than parts.
    """
    order = sorted(set(prompts), key=lambda text: (crc32(f"{seed} {text}".encode()), text))
    if len(order) <= len(shares):
        raise UserError(
            f"training, validation and held-out pairs need {len(shares) + 1} different prompts at least, "
            f"got {len(order)}: label pairs of more prompts"
        )
    part_of: dict[str, int] = {}
    start = 0
    for part, share in enumerate(shares, 1):
        spare = len(order) - start - (len(shares) - part) - 1
        stop = start + min(max(1, round(share * len(order))), spare)
        part_of |= dict.fromkeys(order[start:stop], part)
        start = stop
    return [part_of.get(prompt, 0) for prompt in prompts]


def _picture(entry: dict[str, object], name: str, folder: Path) -> Path:
    value = entry.get(name)
    if not isinstance(value, str) or not value:
        raise UserError(f"{name!r} must be the path of a picture, got {value!r}")
    path = Path(value).expanduser()
    path = path if path.is_absolute() else folder / path
    if not path.is_file():
        raise UserError(f"{name!r}: there is no picture {path}")
    return path
