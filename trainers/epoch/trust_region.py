"""Steps of a given length in nats: the natural gradient (Amari 1998), and TRPO (arXiv:1502.05477).

With g the gradient of what is maximised and F the Fisher matrix of the recorded steps (`ddpo.curvature`),

    d = (F + damping M)^-1 g  by conjugate gradients,      step = sqrt(2 radius / d^T F d) d

moves the mean step by `radius` nats, to second order. M measures the weights themselves, at the scale that F has along
the gradient, or, with the diagonal preconditioner, by a running estimate of F's diagonal. TRPO then goes back along the
step until the exact KL is within the radius and the steps are worth more than before.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from ddpo.curvature import Solution, Vector, combined, conjugate_gradients, dot
from trainers.config.optimizer import PROBES, OptimizerConfig, TrustRegion
from trainers.epoch.curvature import Geometry
from trainers.epoch.learner import Learner
from trainers.epoch.step_rules import StepReport, StepRule, Update, check_progress

FISHER = "fisher"
KEPT = 0.9
"""Decay of the running mean of the diagonal."""
RESIDUAL = 1e-4
OVER = 1.05
"""The largest KL that TRPO accepts, in radii."""
SMALLEST = 1e-6
"""Of the diagonal, in means of it."""


class CurvedUpdate(Update, Protocol):
    """An update that knows its geometry."""

    def geometry(self, *, stride: int) -> Geometry:
        """Over every `stride`-th of its recorded steps."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A step that was tried.

    Attributes:
        factor: On the direction.
        gain: What the recorded steps have become worth, advantage units.
        nats: Their mean KL from before.
        backtracks: Candidates that were given up before.
    """

    factor: float
    gain: float
    nats: float
    backtracks: int


def trust_region(options: OptimizerConfig) -> StepRule:
    """One step of a given length for each learner that has recorded steps."""
    region = options.region

    def step(learners: Sequence[Learner], update: Update) -> dict[str, StepReport]:
        (learner,) = learners
        update.accumulate()
        gradient = {
            name: torch.zeros_like(value) if value.grad is None else -value.grad.detach()
            for name, value in learner.parameters.items()
        }
        learner.optimizer.zero_grad(set_to_none=True)
        norm = dot(gradient, gradient) ** 0.5
        finite = norm < float("inf")
        report = StepReport(grad_norm=None, learning_rate=0.0)
        if finite:
            geometry = cast("CurvedUpdate", update).geometry(stride=region.stride)
            measured = _take(learner, geometry, gradient, region) if norm > 0 else {}
            report = StepReport(grad_norm=norm, learning_rate=measured.get("step_length", 0.0), measured=measured)
            learner.update_averages(after="step")
        learner.counts.updates += 1
        learner.counts.skipped += not finite
        learner.counts.skipped_in_a_row = 0 if finite else learner.counts.skipped_in_a_row + 1
        check_progress(learner, cure="lower optimizer.radius")
        return {learner.name: report}

    return step


def _take(learner: Learner, geometry: Geometry, gradient: Vector, region: TrustRegion) -> dict[str, float]:
    """Steps; returns what was measured."""
    metric = _metric(learner, geometry) if region.diagonal else None
    solution, squared = direction(
        geometry.product, gradient, metric=metric, damping=region.damping, iterations=region.cg_iterations
    )
    geometry.remember()
    start = {name: value.detach().clone() for name, value in learner.parameters.items()}

    @torch.no_grad()
    def place(factor: float) -> None:
        for name, value in learner.parameters.items():
            value.copy_(start[name] + factor * solution.x[name])

    full = (2 * region.radius / squared) ** 0.5 if squared > 0 else 0.0
    taken = search(place, geometry.moved, full, radius=region.radius, backtracks=region.backtracks)
    return {
        "kl_nats": taken.nats,
        "surrogate_gain": taken.gain,
        "step_length": taken.factor,
        "backtracks": float(taken.backtracks),
        "cg_iterations": float(solution.iterations),
        "cg_residual": solution.residual,
    }


def direction(
    product: Callable[[Vector], Vector],
    gradient: Vector,
    *,
    metric: Mapping[str, Tensor] | None,
    damping: float,
    iterations: int,
) -> tuple[Solution, float]:
    """Solves (F + damping M) d = g; returns it and d^T F d.

    Args:
        product: v -> F v.
        gradient: g.
        metric: Diagonal of M, positive; None for the identity times g^T F g / g^T g, the scale of F along g.
        damping: At least 0.
        iterations: Of conjugate gradients, at most.
    """
    weights = metric
    if weights is None:
        scale = dot(gradient, product(gradient)) / dot(gradient, gradient)
        weights = {name: torch.full_like(value, max(scale, 0.0)) for name, value in gradient.items()}

    def damped(v: Vector) -> Vector:
        return combined(product(v), damping, {name: weights[name] * value for name, value in v.items()})

    found = conjugate_gradients(damped, gradient, metric=metric, iterations=iterations, tolerance=RESIDUAL)
    return found, dot(found.x, product(found.x))


def search(
    place: Callable[[float], None],
    moved: Callable[[], tuple[float, float]],
    full: float,
    *,
    radius: float,
    backtracks: int,
) -> Candidate:
    """Goes back along a step until it is worth something and within the radius; to where it began where it never is.

    A step that is too long is shortened to the length that a quadratic KL would need, one that is worth less halved.

    Args:
        place: Puts the weights at a multiple of the direction.
        moved: What the steps have gained since before, and their KL, nats.
        full: The first multiple.
        radius: Nats.
        backtracks: Candidates beyond the first; 0 takes that one, whatever it is worth.
    """
    factor = full
    for number in range(backtracks + 1):
        place(factor)
        gain, nats = moved()
        if not backtracks or (gain > 0 and nats <= OVER * radius):
            return Candidate(factor=factor, gain=gain, nats=nats, backtracks=number)
        factor *= (radius / nats) ** 0.5 if gain > 0 else 0.5
    place(0.0)
    return Candidate(factor=0.0, gain=0.0, nats=0.0, backtracks=backtracks)


def _metric(learner: Learner, geometry: Geometry) -> Vector:
    """The running diagonal of F, kept in the optimizer's state, with a floor."""
    state = learner.optimizer.state
    for name, found in geometry.diagonal(PROBES).items():
        held = state[learner.parameters[name]]
        held[FISHER] = found if FISHER not in held else KEPT * held[FISHER] + (1 - KEPT) * found
    running = {name: state[parameter][FISHER] for name, parameter in learner.parameters.items()}
    mean = sum(float(value.double().sum()) for value in running.values()) / sum(map(torch.numel, running.values()))
    return {name: value + max(SMALLEST * mean, 1e-30) for name, value in running.items()}
