"""The known words that an unknown one may stand for: misspelt, shortened, or by its initials."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

_LETTERS = 3  # fewer, of a part of a word, say too little


def nearest(word: str, valid: Sequence[str], *, most: int = 3, alike: float = 0.6) -> list[str]:
    """Known words that `word` may stand for, the likeliest first; empty when there are none.

    Args:
        word: What was written.
        valid: The known words, parts of which are joined by `_`, `-` or `.`.
        most: How many to give.
        alike: How alike a misspelling must be, 0 to 1 (`difflib`).
    """
    close = difflib.get_close_matches(word, valid, n=most, cutoff=alike)
    if close:
        return close
    asked = _parts(word)
    whole = len(word) >= _LETTERS
    shortened = [known for known in valid if whole and (known.startswith(word) or set(asked) <= set(_parts(known)))]
    initials = [known for known in valid if len(word) > 1 and "".join(part[0] for part in _parts(known)) == word]
    return [*shortened, *initials][:most]


def _parts(word: str) -> list[str]:
    return [part for part in word.lower().replace("-", "_").replace(".", "_").split("_") if part]
