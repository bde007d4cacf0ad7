"""What a user should know about a reward before trusting it: where it comes from, its licence, usual scores."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Card:
    """Provenance of a reward, shown by `ddpo rewards list --verbose`.

    Attributes:
        origin: paper or repository of the score and of its weights.
        licence: of the weights, or of the definition when there are none; "not stated" when the authors give none.
        typical: scores that usual pictures get.
        extra: pip extra of `ddpo` that brings the packages needed; empty when none is.
        modules: the packages themselves, as imported.
    """

    origin: str = ""
    licence: str = ""
    typical: str = ""
    extra: str = ""
    modules: tuple[str, ...] = ()
