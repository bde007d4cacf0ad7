"""What is worth knowing about a reward before using it: where it comes from, its licence, usual scores."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rewards.downloads import Download
from rewards.optional import installed


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """What a reward needs instead of `Card.modules` when an option has a certain value.

    Attributes:
        option: Name of the option.
        value: The value that makes the difference.
        modules: Packages needed then, as imported.
        programs: Programs needed then, as called.
        extra: Pip extra of `ddpo` that brings the modules.
        install: Command that brings what is needed, where it is no extra.
    """

    option: str
    value: str
    modules: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    extra: str = ""
    install: str = ""


def parts_in_terms(options: Mapping[str, object]) -> list[tuple[str, Mapping[str, object]]]:
    """Names and options of the rewards in a list `terms` of mappings with `name` and `options`."""
    terms = options.get("terms")
    named = [term for term in terms if isinstance(term, Mapping)] if isinstance(terms, list | tuple) else []
    return [part for term in named for part in part_of(term.get("name"), term.get("options"))]


def part_of(name: object, options: object) -> list[tuple[str, Mapping[str, object]]]:
    """A reward inside another as `Card.parts` lists it; nothing where `name` is no text."""
    return [(name, options if isinstance(options, Mapping) else {})] if isinstance(name, str) else []


@dataclass(frozen=True, kw_only=True)
class Card:
    """Provenance of a reward, shown by `ddpo rewards list --verbose`.

    Attributes:
        origin: Paper or repository of the score and of its weights.
        licence: Of the weights, or of the definition when there are none; "not stated" when the authors give none.
        typical: Scores that usual pictures get.
        extra: Pip extra of `ddpo` that brings the packages needed; empty when none is.
        modules: The packages themselves, as imported.
        alternatives: Other needs under certain options; the first that applies replaces `modules`.
        downloads: What it fetches by default.
        caution: What to know before it is optimised; empty when there is nothing.
        version: Of its scores: one more whenever a reward of this package is to score otherwise than before.
        parts: From the options to names and options of the rewards that it is made of, whose needs are its own too.
    """

    origin: str = ""
    licence: str = ""
    typical: str = ""
    extra: str = ""
    modules: tuple[str, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    downloads: tuple[Download, ...] = ()
    caution: str = ""
    version: int = 1
    parts: Callable[[Mapping[str, object]], Sequence[tuple[str, Mapping[str, object]]]] = parts_in_terms

    def missing(self, options: Mapping[str, object]) -> list[str]:
        """Packages and programs that a reward with these options needs and that are not installed here."""
        other = self._alternative(options)
        if other is None:
            return [module for module in self.modules if not installed(module)]
        absent = [program for program in other.programs if shutil.which(program) is None]
        return [module for module in other.modules if not installed(module)] + absent

    def install(self, options: Mapping[str, object]) -> str:
        """The command that brings what a reward with these options needs."""
        other = self._alternative(options)
        if other and other.install:
            return other.install
        extra = other.extra if other else self.extra
        return f"pip install 'ddpo[{extra}]'" if extra else "pip install ddpo"

    def _alternative(self, options: Mapping[str, object]) -> Alternative | None:
        return next((other for other in self.alternatives if options.get(other.option) == other.value), None)
