"""Regression on clean samples through the trainer: the loop that fine-tunes Stable Diffusion, on known data.

    gap = E |x0_hat - x0_hat*|^2 of what was trained / the same of the pretrained network

over the noisy steps, x0_hat* the denoiser of the tilted law and x its noised states; 0 is what theory says, 1 is where
training started. The tilted law is that of the pretrained chain's own end, which the chain's exact law on a grid gives.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ddpo import Policy
from ddpo.control.checks.base import Check, Measurement
from ddpo.control.diffusion.toy_problem import MixtureProblem, mixture_problem, toy_problem
from ddpo.credit.advantages import AdvantageConfig
from ddpo.objectives.clean_sample import CleanSampleConfig
from trainers.verification.optimum import Recipe, measured, tilted_denoiser_gap, train_quietly

TEMPERATURE, BAR, RAM_BAR = 0.5, 7e-2, 0.1
MIXTURE = Recipe(
    objective=CleanSampleConfig(temperature=TEMPERATURE, noises=32, updates_per_epoch=32, inner_epochs=8),
    samples_per_epoch=1024,
    epochs=1,
    learning_rate=0.01,
    ema_decay=0.95,
)
RAM = Recipe(
    objective=CleanSampleConfig(
        preset="ram", multiplier=1 / TEMPERATURE, times="grid", noises=4, updates_per_epoch=4, old_limit=0.5
    ),
    advantages=AdvantageConfig(baseline="batch", scale="none", clip=None),
    samples_per_epoch=512,
    epochs=60,
    learning_rate=0.05,
    ema_decay=0.9,
)


def tilted_mixture_gap(problem: MixtureProblem, recipe: Recipe, *, temperature: float) -> float:
    """Trains a small network by weighted regression; how far it is from the denoiser of the tilted mixture."""
    policy = problem.policy()
    z, weights = chain_end(problem)
    weights = weights * torch.exp(problem.reward(z[:, None]) / temperature)
    pretrained = denoiser_error(policy, z, weights / weights.sum())
    trained = train_quietly(policy, problem, recipe)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            parameter.copy_(trained[name])
    return denoiser_error(policy, z, weights / weights.sum()) / pretrained


def chain_end(problem: MixtureProblem) -> tuple[Tensor, Tensor]:
    """Where the pretrained chain ends: points (n,) and their probabilities (n,)."""
    chain = problem.chain
    x, weights = chain.grid, torch.softmax(-0.5 * chain.grid**2, 0)
    for k, std in enumerate(chain.std.tolist()):
        if std == 0:
            x = chain.reference(k, x)
            continue
        kernel = torch.exp(-0.5 * ((chain.grid - chain.reference(k, x)[:, None]) / std) ** 2)
        weights = weights @ (kernel / kernel.sum(1, keepdim=True))
    return x, weights


@torch.no_grad()
def denoiser_error(policy: Policy, z: Tensor, weights: Tensor) -> float:
    """E |x0_hat(x) - E[z | x]|^2 of data z (n,) with probabilities (n,), over states x at the noisy steps."""
    schedule, x = policy.schedule, torch.linspace(-6, 6, 601, dtype=torch.float64)
    condition, total = policy.encode([""] * len(x)), 0.0
    for k in schedule.stochastic_steps:
        a, s = float(schedule.a[k]), float(schedule.s[k])
        joint = weights * torch.exp(-0.5 * ((x[:, None] - a * z) / s) ** 2) / s
        density = joint.sum(1)
        exact = joint @ z / density.clamp(min=1e-300)
        error = (policy.predict(k, x[:, None].float(), condition).x0[:, 0].double() - exact).square()
        total += float((density * error).sum() / density.sum())
    return total


def check_mixture() -> Iterator[Measurement]:
    """Weighted regression with a network; what is left is the noise of the samples and of training."""
    gap = tilted_mixture_gap(mixture_problem(), MIXTURE, temperature=TEMPERATURE)
    yield measured(f"rwr, {MIXTURE.num_paths:,} samples", gap, BAR)


def check_ram() -> Iterator[Measurement]:
    """RAM on Gaussian data with a linear reward; a part of what is left is that 10 steps end a little off the data."""
    gap = tilted_denoiser_gap(toy_problem(2, kind="linear"), RAM, temperature=TEMPERATURE)
    yield measured(f"RAM, {RAM.num_paths:,} samples", gap, RAM_BAR)


CHECKS = (
    Check(name="tilted mixture", group="clean_sample", level="full", run=check_mixture,
          claim="A network that is trained for one round of weighted regression is the tilted mixture's denoiser."),
    Check(name="RAM", group="clean_sample", level="full", run=check_ram,
          claim="RAM ends at the tilted law's denoiser where the reward is linear and the data are Gaussian."),
)  # fmt: skip
