"""A family of policies in one number: what the path KL does when its weight changes, in all ways that are plausible.

The displacement u of a policy moves towards u*, where its weight lets it rest. In units of the target and of the weight
alpha* that would hold it, and of epochs,

    u* = (alpha / alpha*)^(-s / p),    KL = u^p,    p = 2 (or 1: u is the KL itself),    s the slope of the KL at rest
    gradient   u' = v (1 - u / u*)                   an integrator whose gradient alpha balances: gradient ascent
    limited    u' = v sign(u* - u)                   an integrator of constant speed: Adam
    lag        u' = v (u* - u), 5 v at most          first order, with time constant 1 / v

The weight may act `delay` epochs late, and the speed may lag itself by `momentum` / 2 epochs. The KL is measured with a
relative error that is uniform within +- `noise`. Under the weight alpha*, or a larger one, none of them exceeds 1.41
times its target: what is seen beyond that is of the controller.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

SUBSTEPS = 4  # of an epoch

Law = Literal["gradient", "limited", "lag"]


def _gradient(u: float, rest: float, speed: float) -> float:
    return speed * (1 - u / rest)


def _limited(u: float, rest: float, speed: float) -> float:
    return max(-speed, min(speed, (rest - u) * SUBSTEPS))


def _lag(u: float, rest: float, speed: float) -> float:
    return max(-5 * speed, min(5 * speed, (rest - u) * speed))


LAWS: dict[Law, Callable[[float, float, float], float]] = {"gradient": _gradient, "limited": _limited, "lag": _lag}
SHAPES: tuple[tuple[Law, int, int], ...] = (
    ("gradient", 2, 2),
    ("limited", 2, 2),
    ("lag", 2, 2),
    ("gradient", 1, 1),
    ("lag", 1, 2),
)  # law, power p, slope s


@dataclass(frozen=True, kw_only=True)
class Plant:
    """A policy.

    Attributes:
        law: How it moves.
        power: Of the displacement in the KL.
        slope: s, of the KL at rest.
        excess: The first weight over alpha*.
        speed: v, about the share of the target's displacement that an epoch makes.
        delay: Epochs.
        momentum: Epochs.
        noise: Of the measured KL, relative.
    """

    law: Law
    power: int
    slope: int
    excess: float
    speed: float
    delay: int
    momentum: int
    noise: float


def family(
    *,
    excesses: Sequence[float] = (1.0, 10.0, 100.0),
    speeds: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    delays: Sequence[int] = (0, 5),
    momenta: Sequence[int] = (0, 5),
    noises: Sequence[float] = (0.0, 0.2),
) -> Iterator[Plant]:
    """Every combination."""
    for (law, power, slope), excess, speed, delay, momentum, noise in itertools.product(
        SHAPES, excesses, speeds, delays, momenta, noises
    ):
        yield Plant(
            law=law, power=power, slope=slope, excess=excess, speed=speed, delay=delay, momentum=momentum, noise=noise
        )  # fmt: skip


def kl_over_target(
    plant: Plant, control: Callable[[float, float], float], *, seed: int, epochs: int | None = None
) -> list[float]:
    """The KL of each epoch, over its target, from 0.

    Args:
        plant: The policy.
        control: The next weight, given the present one and the measured KL; weights are over `alpha*`.
        seed: Of the measurement's error.
        epochs: How many; 25 times as many as the policy takes at full speed, between 300 and 3,000, unless given.
    """
    rng, law = random.Random(seed), LAWS[plant.law]
    share = min(1.0, 2 / (SUBSTEPS * plant.momentum)) if plant.momentum else 1.0
    u = velocity = 0.0
    weight, weights, found = plant.excess, [], []
    for epoch in range(epochs or int(min(3000, max(300, 25 / plant.speed)))):
        found.append(u**plant.power)
        weights.append(weight)
        acting = weights[max(0, epoch - plant.delay)]
        rest = min(1e6, acting ** (-plant.slope / plant.power))
        for _ in range(SUBSTEPS):
            velocity += share * (law(u, rest, plant.speed) - velocity)
            move = velocity / SUBSTEPS
            if not plant.momentum:
                move = math.copysign(min(abs(move), abs(rest - u)), move)
            u = max(0.0, u + move)
        weight = control(weight, found[-1] * (1 + plant.noise * rng.uniform(-1, 1)))
    return found
