"""What a reward of a configuration needs installed, known from its card alone: nothing is imported or constructed."""

from __future__ import annotations

from collections.abc import Mapping

from rewards.registry import find


def check_requirements(name: str, options: Mapping[str, object]) -> None:
    """Refuses a reward, or one that it is made of, whose packages or programs are not installed.

    Args:
        name: any name `rewards.resolve` understands.
        options: of the reward; rewards in a list `terms` are looked at too.

    Raises:
        ImportError: something is missing; the message says what and how to get it.
        ValueError: nothing goes by that name.
    """
    noted = find(name)
    absent = noted.card.missing(options)
    if absent:
        cure = noted.card.install(options)
        raise ImportError(f"reward {noted.name!r} needs {', '.join(absent)}, not installed here: {cure}")
    terms = options.get("terms")
    for term in terms if isinstance(terms, list | tuple) else ():
        if isinstance(term, Mapping) and isinstance(term.get("name"), str):
            nested = term.get("options")
            check_requirements(term["name"], nested if isinstance(nested, Mapping) else {})
