"""GenEval's decision on a picture, from the objects found in it. Pure functions, no network.

Strict, as the official evaluation decides (Ghosh et al. 2023, section 3): of each `include` clause the `count` surest
objects of its class are taken; they must exist, all have the colour asked, and each must stand in the relation asked to
each of the objects taken for the clause it refers to. No `exclude` clause may find its number.

Relative position of A to B, with centres c and sizes (w, h):

    offset = c_A - c_B,   rest = sign(offset) max(|offset| - 0.1 (size_A + size_B), 0)      for each axis
    A is left of B if rest_x / |offset| < -0.5, right of > 0.5, above if rest_y / |offset| < -0.5, below > 0.5

Partial, for learning, is 1 exactly where strict is, otherwise the mean over everything that is asked:

    number     1 - shortfall / count, or 1 - excess / count where an exclude clause limits the same class; at least 0
    colour     share of the `count` objects that have it
    position   share of pairs that stand in the relation; 0 where the other clause did not hold
    absence    1 or 0, of an exclude clause whose class is not included

Flow-GRPO (arXiv:2505.05470) learns from such a score too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rewards.builtin.geneval.spec import Clause, Relation, Spec

POSITION_THRESHOLD = 0.1
_PIXELS = 1e-3

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A detected object.

    Attributes:
        box: Where it is.
        score: Confidence of the detector in [0, 1].
        color: What it looks like; None where nobody asked.
    """

    box: Box
    score: float
    color: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a picture is worth.

    Attributes:
        strict: Whether everything holds.
        partial: In [0, 1], 1 exactly when `strict`.
        reasons: What does not hold.
    """

    strict: bool
    partial: float
    reasons: tuple[str, ...]


def judge(spec: Spec, objects: Mapping[str, Sequence[Found]], *, threshold: float = POSITION_THRESHOLD) -> Verdict:
    """Decides on a picture.

    Args:
        spec: What it must show.
        objects: What was found for each class, surest first.
        threshold: Share of the summed sizes that does not count as an offset.
    """
    terms: list[float] = []
    reasons: list[str] = []
    taken: list[Sequence[Found]] = []  # empty for a clause that does not hold
    for clause in spec.include:
        found = objects.get(clause.kind, ())
        marks = _include(clause, found, _most(spec, clause), taken, threshold)
        terms += marks.values()
        chosen = found[: clause.count]
        reasons += [f"{what} of {_describe(clause, spec)}" for what, mark in marks.items() if mark < 1]
        own = {what: mark for what, mark in marks.items() if what != "number"}
        holds = len(chosen) == clause.count and all(mark == 1 for mark in own.values())
        taken.append(chosen if holds else ())
    for clause in spec.exclude:
        if clause.kind not in {other.kind for other in spec.include}:
            is_absent = len(objects.get(clause.kind, ())) < clause.count
            terms.append(float(is_absent))
            reasons += [] if is_absent else [f"{clause.kind} must number fewer than {clause.count}"]
    return Verdict(strict=not reasons, partial=math.fsum(terms) / len(terms), reasons=tuple(reasons))


def relations(first: Box, second: Box, *, threshold: float = POSITION_THRESHOLD) -> frozenset[Relation]:
    """How the first box lies to the second, by the rule above; empty when it is neither here nor there."""
    offset = [(first[axis] + first[axis + 2] - second[axis] - second[axis + 2]) / 2 for axis in (0, 1)]
    sizes = [abs(first[axis + 2] - first[axis]) + abs(second[axis + 2] - second[axis]) for axis in (0, 1)]
    rest = [math.copysign(max(abs(o) - threshold * s, 0.0), o) for o, s in zip(offset, sizes, strict=True)]
    if max(map(abs, rest)) < _PIXELS:
        return frozenset()
    dx, dy = (part / math.hypot(*offset) for part in rest)
    held: dict[Relation, bool] = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return frozenset(relation for relation, holds in held.items() if holds)


def suppress(found: Sequence[Found], *, overlap: float, limit: int) -> list[Found]:
    """The surest objects, without those that overlap a surer one of the same class: non-maximum suppression.

    Args:
        found: Objects of one class, in any order.
        overlap: Intersection over union from which two are taken for one; 1 keeps all.
        limit: How many to keep at most before suppression.
    """
    kept: list[Found] = []
    for candidate in sorted(found, key=lambda one: -one.score)[:limit]:
        if overlap >= 1 or all(intersection_over_union(candidate.box, other.box) < overlap for other in kept):
            kept.append(candidate)
    return kept


def intersection_over_union(first: Box, second: Box) -> float:
    """Of two boxes, in [0, 1]."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0.0) * max(height, 0.0)
    together = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)) - shared
    return shared / together if together > 0 else 0.0


def _include(
    clause: Clause, found: Sequence[Found], most: float, taken: Sequence[Sequence[Found]], threshold: float
) -> dict[str, float]:
    """A mark in [0, 1] for everything that a clause asks."""
    chosen = found[: clause.count]
    wrong = max(clause.count - len(found), len(found) - most, 0)
    marks = {"number": max(0.0, 1 - wrong / clause.count)}
    is_enough = len(chosen) == clause.count
    if clause.color is not None:
        marks["color"] = sum(one.color == clause.color for one in chosen) / clause.count if is_enough else 0.0
    if clause.relation is not None:
        pairs = [(one, other) for one in chosen for other in taken[clause.target]] if is_enough else []
        held = [clause.relation in relations(one.box, other.box, threshold=threshold) for one, other in pairs]
        marks["position"] = sum(held) / len(held) if held else 0.0
    return marks


def _most(spec: Spec, clause: Clause) -> float:
    """The largest number of objects of a clause's class that no exclude clause objects to."""
    return min((other.count - 1 for other in spec.exclude if other.kind == clause.kind), default=math.inf)


def _describe(clause: Clause, spec: Spec) -> str:
    text = f"{clause.count} {clause.color or ''} {clause.kind}".replace("  ", " ")
    return f"{text} {clause.relation} {spec.include[clause.target].kind}" if clause.relation else text
