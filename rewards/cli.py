"""What `ddpo rewards list` and `ddpo rewards score` print."""

from __future__ import annotations

import glob
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from rewards.construct import Registration
from rewards.registry import available, find, resolve


def list_rewards(verbose: bool = False) -> str:
    """A table of every reward that can be named, with its range and whether it is differentiable.

    Args:
        verbose: also show where each is defined.
    """
    header = ["name", "gradient", "range", "description"] + (["source"] if verbose else [])
    rows = [_row(name, origin, verbose=verbose) for name, origin in available().items()]
    own = "Your own: file.py:name or module:name, a function (images, prompts, metadata) -> Tensor (B,)."
    return f"{table(header, rows)}\n\n{own}"


def score(name: str, image_paths: Sequence[str | Path], prompt: str | Sequence[str] | None = None) -> str:
    """A table of the scores of image files, one row each, with components; a mean row for several.

    Args:
        name: any name `rewards.resolve` understands.
        image_paths: files or patterns such as `pictures/*.png`.
        prompt: what the images should show: one for all or one for each; empty when None.

    Raises:
        ValueError: no such file, not an image, a pattern without matches, or prompts that do not fit.
    """
    reward = resolve(name)
    paths = expand(image_paths)
    prompts = _prompts(prompt, len(paths))
    rows = []
    for path, text in zip(paths, prompts, strict=True):
        scores = reward(load_image(path), [text], [{}])  # one at a time: files differ in size
        rows.append([float(scores.total), *(float(values) for values in scores.components.values())])
        header = [reward.name, *scores.components]
    cells = [[str(path), *_numbers(row)] for path, row in zip(paths, rows, strict=True)]
    if len(rows) > 1:
        cells.append(["mean", *_numbers(np.mean(rows, axis=0))])
    return table(["image", *header], cells, right=True)


def expand(patterns: Sequence[str | Path]) -> list[Path]:
    """The files that paths and patterns name, each pattern's matches sorted.

    Raises:
        ValueError: nothing given, a missing file, a folder, or a pattern without matches.
    """
    if not patterns:
        raise ValueError("no images given; name files, or quote a pattern such as 'pictures/*.png'")
    found: list[Path] = []
    for pattern in map(str, patterns):
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise ValueError(f"{pattern} is a folder; write '{pattern.rstrip('/')}/*.png' for the pictures in it")
        matches = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
        matches = [match for match in matches if match.is_file()]
        if not matches:
            is_pattern = any(letter in pattern for letter in "*?[")
            raise ValueError(f"no file matches {pattern!r}" if is_pattern else f"no such image: {pattern}")
        found += matches
    return found


def load_image(path: Path) -> Tensor:
    """Read an image file as `(1, 3, H, W)` float32 in [0, 1].

    Raises:
        ValueError: PIL cannot read it.
    """
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0).contiguous()


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: bool = False) -> str:
    """Plain-text columns under a ruled header; `right` aligns all but the first column to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for cells in [list(header), ["-" * width for width in widths], *map(list, rows)]:
        aligned = [
            cell.rjust(width) if right and index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def _row(name: str, origin: str, *, verbose: bool) -> list[str]:
    try:
        noted = find(name)
    except (ImportError, ValueError) as error:  # a plug-in that cannot be loaded must not hide the others
        cells = [name, "-", "-", f"unavailable: {error}", origin]
    else:
        cells = [
            name,
            "yes" if noted.differentiable else "no",
            _format_range(noted.range),
            _describe(noted),
            noted.source,
        ]
    return cells if verbose else cells[:-1]


def _format_range(bounds: tuple[float, float] | None) -> str:
    """`[0, 1]`, `(-inf, 0]`, or `-` when not stated."""
    if bounds is None:
        return "-"
    low = "(-inf" if math.isinf(bounds[0]) else f"[{bounds[0]:g}"
    high = "inf)" if math.isinf(bounds[1]) else f"{bounds[1]:g}]"
    return f"{low}, {high}"


def _describe(noted: Registration) -> str:
    return noted.description or "(no description)"


def _numbers(values: Sequence[float] | np.ndarray) -> list[str]:
    return [f"{value:.4f}" for value in values]


def _prompts(prompt: str | Sequence[str] | None, count: int) -> list[str]:
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""] * count
    if len(prompt) != count:
        raise ValueError(f"{count} images need one prompt for all or {count} prompts, got {len(prompt)}")
    return list(prompt)
