"""The gradient of training against the exact gradient of the objective, for objectives and options."""

from collections.abc import Callable, Iterator

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.diffusion.gradient_check import (
    GradientComparison,
    compare_gradients,
    draw_paths,
    joined,
    pathwise_gradients,
)
from ddpo.control.diffusion.toy_problem import toy_problem
from ddpo.credit.advantages import AdvantageConfig
from ddpo.objectives import PolicyGradientConfig
from ddpo.sampling.samplers import SamplerConfig

RMS_BAR, MAX_BAR = 1.25, 4.5
REINFORCE = PolicyGradientConfig(surrogate="reinforce", updates_per_epoch=1)
VARIANTS: tuple[tuple[str, PolicyGradientConfig, AdvantageConfig, float | None], ...] = (
    ("REINFORCE", REINFORCE, AdvantageConfig(baseline="batch", scale="none", clip=None), None),
    ("REINFORCE, alpha 0", REINFORCE, AdvantageConfig(baseline="batch", scale="none", clip=None), 0.0),
    ("PPO, joint ratio, groups", PolicyGradientConfig(ratio="joint"),
     AdvantageConfig(baseline="group", scale="none", clip=None), None),
    ("PPO, per-dimension ratio, batch std", PolicyGradientConfig(ratio="per_dimension"),
     AdvantageConfig(baseline="group", scale="batch_std", clip=None), None),
)  # fmt: skip


def gradients(sampler: SamplerConfig, *, num_paths: int = 200_000) -> Callable[[], Iterator[Measurement]]:
    """The check of every variant on one sampler's chain."""

    def run() -> Iterator[Measurement]:
        paths = draw_paths(toy_problem(sampler=sampler), num_paths=num_paths)
        for name, objective, advantages, alpha in VARIANTS:
            found = compare_gradients(paths, objective, advantages, alpha=alpha)
            yield z_row(name, found)

    return run


def z_row(name: str, found: GradientComparison) -> Measurement:
    """z-scores as a row."""
    return Measurement(
        name=name,
        exact=f"rms z 1 (<= {RMS_BAR}), max <= {MAX_BAR}",
        obtained=f"rms z {found.rms_z:.2f}, max {found.max_z:.1f}",
        error=max(found.rms_z / RMS_BAR, found.max_z / MAX_BAR),
        tolerance=1.0,
    )


def check_pathwise() -> Iterator[Measurement]:
    """The chain rule through the paths' own noise, at four weights."""
    drawn = [draw_paths(toy_problem(sampler=DDIM), num_paths=6_000, chunk_size=200, seed=seed) for seed in range(4)]
    yield z_row("reward gradient at 4 weights", joined([pathwise_gradients(paths) for paths in drawn]))


DDIM = SamplerConfig(num_steps=10, guidance_scale=1.0)
FLOW = SamplerConfig(kind="flow_sde", num_steps=10, eta=0.7, guidance_scale=1.0)

CHECKS = (
    Check(name="DDIM", group="gradient", level="fast", run=gradients(DDIM, num_paths=120_000),
          claim="The Monte Carlo gradient of every objective is the exact gradient of E[r] - alpha sum KL (DDIM)."),
    Check(name="pathwise", group="gradient", level="full", run=check_pathwise,
          claim="Differentiating the chain itself gives the same exact gradient."),
    Check(name="flow SDE", group="gradient", level="full", run=gradients(FLOW),
          claim="The same for the flow-matching SDE."),
)  # fmt: skip
