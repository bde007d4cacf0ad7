"""What a reward of a configuration needs installed, known from its card alone: nothing is imported or constructed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from rewards.base import MissingPackageError
from rewards.construct import check_call, check_options
from rewards.registry import find


def check_requirements(name: str, options: Mapping[str, object]) -> None:
    """Refuses a reward, or one that it is made of, that does not take its options or needs what is not installed.

    Args:
        name: Any name `rewards.resolve` understands.
        options: Of the reward; those that it is made of (`Card.parts`) are looked at too.

    Raises:
        ImportError: Something is missing; the message says what and how to get it.
        UserError: Nothing goes by that name, the options do not fit, or it takes other arguments than a reward; the
            message says what would.
    """
    noted = find(name)
    absent = noted.card.missing(options)
    if absent:
        cure = noted.card.install(options)
        raise MissingPackageError(f"reward {noted.name!r} needs {', '.join(absent)}, not installed here: {cure}")
    check_options(noted, options)
    if not inspect.isclass(noted.target):  # what objects of a class can be called with is seen when one is made
        check_call(noted.target, name=noted.name, source=noted.source)
    for part, nested in noted.card.parts(options):
        check_requirements(part, nested)


def reported_name(name: str, options: Mapping[str, object]) -> str:
    """What a reward without a label is reported under.

    Args:
        name: Any name `rewards.resolve` understands.
        options: Of the reward.

    Raises:
        UserError: Nothing goes by that name.
    """
    noted = find(name)
    return str(options["reward"]) if noted.name == "remote" else noted.name
