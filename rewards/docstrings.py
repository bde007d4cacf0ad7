"""Reads a section of a Google docstring, so that options and keys are documented in one place."""

import inspect
import re


def documented(target: object, section: str) -> dict[str, str]:
    """The entries of a section of a docstring, name to text.

    Args:
        target: A class or function.
        section: Its heading, such as `Args` or `Attributes`.
    """
    _, _, entries = (inspect.getdoc(target) or "").partition(f"{section}:\n")
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", entries, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}
