"""How the adaptive weight of the KL follows the measured KL: tried and kept still while the KL rises, then held.

A policy answers a new weight over many updates. How many is not known, and a KL that rises slowly looks like one that
the weight keeps down: a controller that integrates the error lowers the weight for as long as the KL rises, and the KL
overshoots severalfold. What tells the two apart is whether the rise slows down *while the weight stays as it is*.

**On its way** (KL below .6 of the target) the weight is still. The KLs since it last moved are cut into thirds, of
means K1, K2, K3, when they are a third of all epochs at least: their number is the plant's own measure of time. Under a
weight that does not bind the KL rises as t or t^2, and K3 - K2 >= K2 - K1. Where it is under half of that, or
nothing, the KL is levelling off, at K3 + (K3 - K2) q / (1 - q), q = (K3 - K2) / (K2 - K1) (Aitken's extrapolation). A
level short of the target means that the weight is too large. The level goes as alpha^-s: s = 2 for a linear reward of
Gaussians. The first step takes s = 4, later ones the slope that the last step had, and go four fifths of the way.

**Held** from there on, by a proportional and an integral term in x = log(KL / target), smoothed over T / 10 epochs
(10 at most), where T is how many epochs the last rise took, since the weight last moved, 12 at least:

    log alpha += P dx + I w,      P = max(rate damping, min(2, T / 100)),      I = min(rate, 4 P / T)
    w = x in [-4, 2], but where the KL rises towards the target:   min(0, x + (T - 12) / 4 dx)

so that a slow policy has a slow integral, and a strong proportional term, which it can bear. A weight that is far too
small at the start is not prevented from overshooting: only a KL above its target shows it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ddpo.credit.kl import AdaptiveKL, KLConfig
from ddpo.validation import UserError

NEAR = 0.6  # share of the target from which the KL is held, and below which a level is one that falls short
FEWEST = 9  # epochs of a try
SHARE = 1 / 3  # of all epochs that a try has at least
SLOWING = 0.5  # (K3 - K2) / (K2 - K1) below which the KL levels off
FIRST = 1 / 4  # change of log(alpha) over log(level) in the first step
AIM = 0.8  # that times the slope, in later ones
SLOPES = (1.8, 6.0)  # bounds of the slope d log(level) / -d log(alpha)
LOWEST = -0.36  # of log(level) in a step, times the epochs of the try: few and noisy ones can mislead
FASTEST = 12  # epochs of a rise at least
SMALLEST, LARGEST = -4.0, 2.0  # of log(KL / target) in a step of the integral
TINY = 1e-12  # of KL / target: the policy starts at a KL of 0


@dataclass(frozen=True, kw_only=True)
class KLCourse:
    """What the adaptive weight knows of the KL so far; saved with a run.

    Attributes:
        epochs: How many were measured.
        rise: KL over target in the epochs since the weight last moved; empty once the KL is held.
        tried: Logarithm of the weight before, and of the KL over target at which the KL levelled off with it; None for
            none.
        pace: Epochs that the last rise took until the KL was near the target, at least 12; None on the way.
        error: Smoothed log(KL / target) where it is held.
    """

    epochs: int = 0
    rise: tuple[float, ...] = ()
    tried: tuple[float, float] | None = None
    pace: int | None = None
    error: float = 0.0

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "KLCourse":
        """What `dataclasses.asdict` and JSON have left of one."""
        made: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**made)


def next_alpha(config: KLConfig, alpha: float, path_kl: float, *, course: KLCourse) -> tuple[float, KLCourse]:
    """The weight for the next epoch, and what is known by then.

    Args:
        config: Fixed or adaptive.
        alpha: The weight that was used in this epoch, reward units per nat.
        path_kl: Mean path KL measured in this epoch, nats; with full noise where it left steps to the ODE.
        course: What was known before this epoch.

    Returns:
        `config.alpha` when fixed; else the updated multiplier, inside its bounds.

    Raises:
        UserError: An adaptive weight has no finite KL to follow.
    """
    if not isinstance(config, AdaptiveKL):
        return config.alpha, course
    if not math.isfinite(path_kl):
        raise UserError(f"kl.kind: adaptive cannot follow a path KL of {path_kl} nats; the policy has diverged")
    relative = max(TINY, path_kl / config.target)
    course = replace(course, epochs=course.epochs + 1)
    if course.pace is not None:
        change, course = _held(config, course, relative)
    elif relative > NEAR:
        pace = max(FASTEST, len(course.rise) + 1)
        change, course = 0.0, KLCourse(epochs=course.epochs, pace=pace, error=math.log(relative))
    else:
        change, course = _on_its_way(replace(course, rise=(*course.rise, relative)), math.log(alpha))
    return config.bounded(alpha * math.exp(change)), course


def _held(config: AdaptiveKL, course: KLCourse, relative: float) -> tuple[float, KLCourse]:
    """Change of log(alpha) near the target."""
    assert course.pace is not None
    proportional = max(config.rate * config.damping, min(2.0, course.pace / 100))
    integral = min(config.rate, 4 * proportional / course.pace)
    moved = (math.log(relative) - course.error) / min(10.0, max(1.0, course.pace / 10))
    error = course.error + moved
    wanted = min(LARGEST, max(SMALLEST, error))
    if wanted < 0 < moved:
        wanted = min(0.0, wanted + (course.pace - FASTEST) / 4 * moved)
    return proportional * moved + integral * wanted, replace(course, error=error)


def _on_its_way(course: KLCourse, log_alpha: float) -> tuple[float, KLCourse]:
    """Change of log(alpha) below the target: none, until the KL levels off."""
    count = len(course.rise)
    if count % 3 or count < max(FEWEST, SHARE * course.epochs):
        return 0.0, course
    level = levels_off(course.rise)
    if level is None or level >= NEAR:
        return 0.0, course
    log_level = math.log(level)
    share = FIRST
    if course.tried is not None and log_alpha < course.tried[0]:
        slope = (log_level - course.tried[1]) / (course.tried[0] - log_alpha)
        share = AIM / min(SLOPES[1], max(SLOPES[0], slope))
    return share * max(LOWEST * count, log_level), replace(course, rise=(), tried=(log_alpha, log_level))


def levels_off(values: tuple[float, ...]) -> float | None:
    """Where a rise ends that slows down, by Aitken's extrapolation of the means of its thirds; None if it goes on."""
    third = len(values) // 3
    first, second, last = (math.fsum(values[i * third : (i + 1) * third]) / third for i in range(3))
    before, now = second - first, last - second
    if now > 0 and now >= SLOWING * before:
        return None
    ratio = max(0.0, now) / before if before > 0 else 0.0
    return last + max(0.0, now) * ratio / (1 - ratio)
