"""Adjoint matching through the real trainer, against the optimum of the chain.

The fixed point is the optimum of J at any number of steps and any noise if a step's control is paired with the adjoint
of the state after it. Paired with that of the state before it, as published, it is short of it by the order of a step.
"""

from collections.abc import Iterator
from dataclasses import replace

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.diffusion.toy_problem import mixture_problem, toy_problem
from ddpo.objectives.adjoint_matching import AdjointMatchingConfig
from ddpo.sampling.samplers import MEMORYLESS_FLOW_ETA, SamplerConfig
from trainers.verification.optimum import Recipe, affine_gap, measured, mixture_gap

GAP_BAR = 1e-4
PUBLISHED_BAR = 3e-2
NOISY_BAR = 5e-3
ADJOINT = Recipe(
    objective=AdjointMatchingConfig(),
    samples_per_epoch=512,
    epochs=150,
    learning_rate=0.15,
    ema_decay=0.95,
)
PUBLISHED = replace(ADJOINT, objective=AdjointMatchingConfig(pairing="published"), epochs=50, learning_rate=0.2)
SHORT = replace(ADJOINT, epochs=70, learning_rate=0.2)
NETWORK = replace(
    ADJOINT,
    objective=AdjointMatchingConfig(updates_per_epoch=5, inner_epochs=2),
    epochs=40,
    learning_rate=0.02,
    ema_decay=0.99,
)
FLOW = SamplerConfig(kind="flow_sde", num_steps=10, eta=MEMORYLESS_FLOW_ETA, guidance_scale=1.0)


def check_optimum() -> Iterator[Measurement]:
    """Both pairings, DDIM with eta 1, d = 4, ten steps."""
    yield measured(f"paired with a_k+1, {ADJOINT.num_paths:,} paths", affine_gap(toy_problem(), ADJOINT), GAP_BAR)
    gap = affine_gap(toy_problem(), PUBLISHED)
    yield Measurement(name=f"paired with a_k, as published, {PUBLISHED.num_paths:,} paths",
                      exact=f"gap above {PUBLISHED_BAR:g}", obtained=f"gap {gap:.1e}", error=PUBLISHED_BAR / gap,
                      tolerance=1.0)  # fmt: skip


def check_flow() -> Iterator[Measurement]:
    """The flow SDE at level sqrt 2."""
    yield measured(f"level sqrt 2, {SHORT.num_paths:,} paths", affine_gap(toy_problem(sampler=FLOW), SHORT), NOISY_BAR)


def check_mixture() -> Iterator[Measurement]:
    """A network on bimodal data."""
    yield measured(f"network, {NETWORK.num_paths:,} paths", mixture_gap(mixture_problem(), NETWORK), NOISY_BAR)


CHECKS = (
    Check(name="optimum", group="adjoint", level="full", run=check_optimum,
          claim="Adjoint matching reaches the chain's optimum; its published pairing does not (Gaussian data, d = 4)."),
    Check(name="flow SDE", group="adjoint", level="full", run=check_flow,
          claim="The same on the flow SDE at level sqrt 2."),
    Check(name="mixture", group="adjoint", level="full", run=check_mixture,
          claim="A network on bimodal data reaches the optimum that dynamic programming knows."),
)  # fmt: skip
