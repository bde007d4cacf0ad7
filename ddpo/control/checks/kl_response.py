"""Whether the adaptive weight of the KL holds its target: on the exact chain, and over a family of plants."""

from collections.abc import Iterable, Iterator
from functools import partial

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.diffusion.kl_response import Controller, respond, reward_std
from ddpo.control.diffusion.toy_problem import ToyProblem, toy_problem
from ddpo.control.problems.kl_plants import LAWS, Plant, family, kl_over_target
from ddpo.credit.kl import AdaptiveKL, first_alpha
from ddpo.credit.kl_course import KLCourse, next_alpha
from ddpo.sampling.samplers import SamplerConfig

TARGET = 0.3
LEARNING_RATES = (0.01, 0.03, 0.1)
OVERSHOOT_BAR, SETTLING_BAR = 1.5, 50


def small_problem() -> ToyProblem:
    """One dimension, five steps of DDIM."""
    return toy_problem(dims=1, sampler=SamplerConfig(num_steps=5, guidance_scale=1.0))


def controller(config: AdaptiveKL) -> Controller:
    """The weight's course as training has it, of one run."""
    course = KLCourse()

    def control(alpha: float, path_kl: float) -> float:
        nonlocal course
        alpha, course = next_alpha(config, alpha, path_kl, course=course)
        return alpha

    return control


def check_step_response() -> Iterator[Measurement]:
    """From a KL of 0 to the target, at three learning rates."""
    problem, config = small_problem(), AdaptiveKL(target=TARGET)
    run = partial(respond, problem, start=first_alpha(config, reward_std(problem)), epochs=70)
    for rate in LEARNING_RATES:
        found = run(control=controller(config), learning_rate=rate)
        overshoot, settled = found.overshoot(TARGET), found.settled(TARGET)
        yield Measurement(
            name=f"learning rate {rate:g}: largest KL / target, epochs to 10%",
            exact=f"<= {OVERSHOOT_BAR:g}, <= {SETTLING_BAR}",
            obtained=f"{overshoot:.2f}, {settled}",
            error=max(overshoot / OVERSHOOT_BAR, settled / SETTLING_BAR),
            tolerance=1.0,
        )


def peaks(plants: Iterable[Plant], config: AdaptiveKL) -> dict[Plant, float]:
    """The largest KL over its target of each plant, under the controller."""
    return {
        plant: max(kl_over_target(plant, controller(config), seed=seed)) for seed, plant in enumerate(plants)
    }  # fmt: skip


def check_family() -> Iterator[Measurement]:
    """The worst of the plants that move by a law."""
    found = peaks(family(), AdaptiveKL(target=1.0, alpha=1.0))
    for law in LAWS:
        own = [peak for plant, peak in found.items() if plant.law == law]
        yield Measurement(
            name=f"{law}, {len(own):,} plants: largest KL / target",
            exact=f"< {OVERSHOOT_BAR:g}",
            obtained=f"{max(own):.2f}",
            error=max(own) / OVERSHOOT_BAR,
            tolerance=1.0,
        )


CHECKS = (
    Check(name="step response", group="kl", level="fast", run=check_step_response,
          claim="The adaptive weight brings the KL to its target, overshoots by less than half, and stays within 10%."),
    Check(name="family of plants", group="kl", level="full", run=check_family,
          claim="Slow or fast, late or noisy, from a weight up to 100 times too large: no overshoot by half."),
)  # fmt: skip
