"""Types of arguments. What does not exist is refused here, before anything heavy is imported."""

import argparse
import difflib
import json
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def add_accept(parser: argparse.ArgumentParser, *choices: str, about: str) -> None:
    """Adds `--accept WHAT`, which may be repeated."""
    parser.add_argument("--accept", action="append", default=[], choices=choices, help=about)


def as_given(kind: type[T], options: argparse.Namespace) -> T:
    """The dataclass whose fields are arguments of the same names."""
    return kind(**{field.name: getattr(options, field.name) for field in fields(kind)})  # type: ignore[arg-type]


def split_overrides(arguments: Sequence[str], *, own: Collection[str]) -> tuple[list[str], list[str]]:
    """Separates a command's own arguments from overrides.

    Args:
        arguments: What follows the command's name.
        own: The command's own options, e.g. `--resume`.

    Returns:
        Own arguments, and overrides as `--key=value` or `--key`, `value` as they stood.
    """
    mine: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        name, equals, _ = token.partition("=")
        if not token.startswith("--") or name in own:
            mine.append(token)
            continue
        overrides.append(token)
        if not equals and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return mine, overrides


def run_folder(text: str) -> Path:
    """A run folder, looked for before anything heavy is imported; the name of one in `runs/` is suggested."""
    path = Path(text)
    if not (path / "config.yaml").is_file():
        parents = [path] if path.is_dir() else [path.parent, Path("runs")]
        runs = {found.parent.name: found.parent for parent in parents for found in parent.glob("[!.]*/config.yaml")}
        near = difflib.get_close_matches(path.name, runs, n=1)
        known = f", did you mean {runs[near[0]]}?" if near else f"; the runs here are {', '.join(sorted(runs))}"
        raise argparse.ArgumentTypeError(f"{path} is not a run folder (no config.yaml in it){known if runs else ''}")
    return path


def run_or_config(text: str) -> Path | str:
    """A run folder as a path; what is a file, or names no folder, stays a text: a configuration."""
    path = Path(text)
    is_name = len(path.parts) == 1 and not path.is_dir()
    is_config = is_name or path.is_file() or path.with_name(f"{path.name}.yaml").is_file()
    return text if is_config else run_folder(text)


def existing(text: str) -> Path:
    """A file or folder that exists."""
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"there is no {path} (looked for {path.absolute()})")
    return path


def model(text: str) -> str:
    """A pipeline's folder, which must exist, or what is none by its looks: a hub id, or `shapes`."""
    looks_local = text.startswith((".", "/", "~")) or text.count("/") > 1
    path = Path(text).expanduser()
    if looks_local and not path.exists():
        raise argparse.ArgumentTypeError(f"there is no folder {path} (looked for {path.absolute()})")
    return text


def names(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def mapping(text: str) -> dict[str, object]:
    """A mapping written as JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'must be a mapping such as {{"head": "head.pth"}}, got {text}')
    return value


def share(text: str) -> float:
    """A number in (0, 1]."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {number:g}")
    return number


def epochs_of_a_rise(text: str) -> int:
    """A number of epochs in which a rise can be told from noise."""
    number = int(text)
    if number < 6:
        raise argparse.ArgumentTypeError(f"must be at least 6 epochs (fewer tell no rise from noise), got {number}")
    return number


def positive(text: str) -> int:
    """A whole number, at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def count(text: str) -> int:
    """A whole number, at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {number}")
    return number
