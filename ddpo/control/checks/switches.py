"""The switches of the policy gradient: which leave it the exact gradient of the objective, and what the others cost.

GRPO-Guard's ratio, Flow-DPPO's mask and noises that belong together leave it as it is, at the weights that sampled.
Weights of steps multiply each step's part. Where steps share their weights, the direction is then another one; how far
it is from the gradient of J is exact: with g_k the gradient of J by the weights of step k, the shared ones have
sum_k phi(k) g_k, and the weighted one is sum_k w_k phi(k) g_k. Advantages that count diversity are a bias anywhere.

What noises that belong together are worth is the variance of the gradient, the sum over all weights, over that of as
many independent samples.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.checks.gradient import DDIM, REINFORCE, z_row
from ddpo.control.diffusion.gradient_check import (
    GradientComparison,
    Paths,
    compare_gradients,
    draw_paths,
    joined,
    length_and_cosine,
    trained_rows,
)
from ddpo.control.diffusion.toy_heads import step_features
from ddpo.control.diffusion.toy_problem import ToyProblem, toy_problem
from ddpo.credit.advantages import AdvantageConfig
from ddpo.objectives import PolicyGradientConfig
from ddpo.objectives.policy_gradient import noise_weights
from ddpo.sampling.samplers import SamplerConfig
from ddpo.sampling.step_selection import StepSelection
from ddpo.seeds import GroupNoise

GROUPS = AdvantageConfig(baseline="group", scale="none", clip=None)
NUM_PATHS, CHUNK_SIZE = 20_000, 400
LITTLE_NOISE = SamplerConfig(num_steps=10, guidance_scale=1.0, eta=0.5)  # the initial state decides much


def check_ratios() -> Iterator[Measurement]:
    """Ratios, masks and weights of steps, at the weights that sampled."""
    paths = draw_paths(toy_problem(sampler=DDIM), num_paths=NUM_PATHS, chunk_size=CHUNK_SIZE)
    for name, objective in (
        ("PPO, guarded ratio", PolicyGradientConfig(ratio="guard")),
        ("PPO, KL mask", PolicyGradientConfig(ratio="joint", mask="kl")),
    ):
        yield z_row(name, compare_gradients(paths, objective, GROUPS))
    found = compare_gradients(paths, PolicyGradientConfig(step_weight="noise_level"), GROUPS)
    steps = trained_rows(paths)
    weights = noise_weights(paths.policy.schedule, steps).double()
    dims = paths.problem.mean.shape[0]
    each = torch.cat([weights.repeat_interleave(dims**2), weights.repeat_interleave(dims)])  # gains, then shifts
    yield z_row("noise weights, each step's part times its own", replace(found, exact=each * found.exact))
    yield diversity_row(paths)


def diversity_row(paths: Paths) -> Measurement:
    """What counting diversity adds to the gradient of the reward, over its length, on the same paths."""
    plain, diverse = (
        compare_gradients(paths, PolicyGradientConfig(), replace(GROUPS, diversity=name), alpha=0.0).estimate
        for name in (None, "distance")
    )
    bias = float((diverse - plain).norm() / plain.norm())
    length, cosine = length_and_cosine(diverse, plain)
    return Measurement(name="diversity, alpha 0: bias over the gradient's length", exact="biased: above 0.02",
                       obtained=f"{bias:.3f} (length {length:.3f}, cosine {cosine:.3f})", error=0.02 / bias,
                       tolerance=1.0)  # fmt: skip


def check_weights() -> Iterator[Measurement]:
    """Noise weights where all steps share their weights."""
    length, cosine = weighted_direction(toy_problem(sampler=DDIM))
    yield Measurement(name="shared weights: length, cosine to the gradient of J", exact="biased: cosine below 0.99",
                      obtained=f"{length:.3f}, {cosine:.3f}", error=cosine, tolerance=0.99)  # fmt: skip


def weighted_direction(problem: ToyProblem, *, seed: int = 0) -> tuple[float, float]:
    """Length and cosine, against the gradient of J, of the one that weighs steps by their noise; exact.

    The weights of a head that all steps share, at random values.
    """
    features, dims = step_features(problem.schedule.num_steps), problem.mean.shape[0]
    generator = torch.Generator().manual_seed(seed)
    gain = 0.05 * torch.randn(features.shape[1], dims, dims, generator=generator, dtype=torch.float64)
    shift = 0.1 * torch.randn(features.shape[1], dims, generator=generator, dtype=torch.float64)
    each = [torch.einsum("tf,f...->t...", features, part).requires_grad_() for part in (gain, shift)]
    own = torch.autograd.grad(problem.value(each[0], each[1]), each)
    steps = torch.tensor(problem.schedule.stochastic_steps)
    weights = torch.zeros(len(features), dtype=torch.float64)
    weights[steps] = noise_weights(problem.schedule, steps).double()

    def shared(weights: Tensor) -> Tensor:
        return torch.cat([torch.einsum("t,tf,t...->f...", weights, features, part).flatten() for part in own])

    return length_and_cosine(shared(weights), shared(torch.ones_like(weights)))


def check_noises() -> Iterator[Measurement]:
    """Gradients from groups whose noises belong together, and their variance."""
    found = {kind: of_group_noise(kind) for kind in get_args(GroupNoise)}
    for kind in ("antithetic", "shared"):
        yield z_row(f"{kind} noises", found[kind])
        ratio = variance_ratio(found[kind], found["independent"])
        yield Measurement(name=f"{kind} noises: variance over that of independent ones", exact="below 1",
                          obtained=ratio, error=ratio, tolerance=1.0)  # fmt: skip
    yield z_row("branches at steps 0, 3 and 6 of 10", joined([of_branches(step) for step in (0, 3, 6)]))


def of_branches(step: int, *, num_paths: int = 24_000) -> GradientComparison:
    """The gradient from groups that share all but one step's noise; the ODE leads to that step and on from it."""
    only = StepSelection(kind="window", size=1, start=step, shift_every_epochs=0)
    sampler = replace(DDIM, stochastic_steps=only)
    paths = draw_paths(
        toy_problem(sampler=sampler), num_paths=num_paths, chunk_size=480, group_noise="shared"
    )  # fmt: skip
    return compare_gradients(paths, REINFORCE, GROUPS)


def of_group_noise(kind: GroupNoise, *, num_paths: int = NUM_PATHS) -> GradientComparison:
    """The gradient of REINFORCE from groups with such noises, on a chain whose steps have little noise."""
    paths = draw_paths(
        toy_problem(sampler=LITTLE_NOISE), num_paths=num_paths, chunk_size=CHUNK_SIZE, group_noise=kind
    )  # fmt: skip
    return compare_gradients(paths, REINFORCE, GROUPS)


def variance_ratio(found: GradientComparison, other: GradientComparison) -> float:
    """The variance of one estimate over that of another from as many samples."""
    return float(found.standard_error.square().sum() / other.standard_error.square().sum())


CHECKS = (
    Check(name="ratios and masks", group="gradient", level="full", run=check_ratios,
          claim="Guarded ratios and KL masks leave the gradient exact; noise weights and diversity do not."),
    Check(name="noise weights", group="gradient", level="fast", run=check_weights,
          claim="Where steps share their weights, weighing them by their noise is a bias."),
    Check(name="group noises", group="gradient", level="full", run=check_noises,
          claim="Antithetic and shared noises leave the gradient exact, with less variance."),
)  # fmt: skip
