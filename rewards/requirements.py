"""What a reward of a configuration needs installed, known from its card alone: nothing is imported or constructed."""

from __future__ import annotations

from collections.abc import Mapping

from rewards.construct import check_options
from rewards.registry import find


def check_requirements(name: str, options: Mapping[str, object]) -> None:
    """Refuses a reward, or one that it is made of, that does not take its options or needs what is not installed.

    Args:
        name: any name `rewards.resolve` understands.
        options: of the reward; those that it is made of (`Card.parts`) are looked at too.

    Raises:
        ImportError: something is missing; the message says what and how to get it.
        ValueError: nothing goes by that name, or the options do not fit; the message says what would.
    """
    noted = find(name)
    absent = noted.card.missing(options)
    if absent:
        cure = noted.card.install(options)
        raise ImportError(f"reward {noted.name!r} needs {', '.join(absent)}, not installed here: {cure}")
    check_options(noted, options)
    for part, nested in noted.card.parts(options):
        check_requirements(part, nested)


def reported_name(name: str, options: Mapping[str, object]) -> str:
    """What a reward without a label is reported under.

    Args:
        name: any name `rewards.resolve` understands.
        options: of the reward.

    Raises:
        ValueError: nothing goes by that name.
    """
    noted = find(name)
    return str(options["reward"]) if noted.name == "remote" else noted.name
