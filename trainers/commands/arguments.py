"""How a subcommand is declared, and types of arguments."""

import argparse
import json
from collections.abc import Callable


def command(
    commands: argparse._SubParsersAction,
    name: str,
    function: Callable[[argparse.Namespace, list[str]], int | None],
    about: str,
    *,
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    """Adds a subcommand.

    Args:
        commands: Where to.
        name: What it is called by.
        function: Runs it, given the arguments and the `--key value` overrides; returns the exit status, None for 0.
        about: One line, for the list of commands and the top of its help.
        epilog: What its help ends with.
    """
    usage = f"ddpo {name} CONFIG [--key value ...]" if name in ("train", "plan") else None
    parser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        usage=usage,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run_command=function)
    return parser


def names(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def mapping(text: str) -> dict[str, object]:
    """A mapping written as JSON."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
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


def positive(text: str) -> int:
    """A whole number, at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
