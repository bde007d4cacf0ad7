"""The gradient where all steps share their weights, as in a real network, and what steps without noise hide from it.

A likelihood-ratio gradient knows the steps that have a density. A step without one is made by the same weights, so J
moves with the weights through it too, and that part is missing:

    grad J = E[ sum over noisy k ... ]  +  E[ dr/dx_T . dx_T/dw of the other steps ] - alpha dKL/dw by them

What is missing is known exactly here (`ToyProblem.value` with and without the derivative of those steps), so the
measured gradient is held to two numbers: to what it can see, in standard errors, and to the whole gradient, by its
length and angle, which must be as predicted. With `objective.noise_free_steps: pathwise` the missing part is added, and
it is held to the whole gradient.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.checks.gradient import REINFORCE, z_row
from ddpo.control.diffusion.chain import step_kls
from ddpo.control.diffusion.gradient_check import (
    GradientComparison,
    compare_gradients,
    draw_paths,
    joined,
    length_and_cosine,
    pathwise_gradients,
    pooled,
)
from ddpo.control.diffusion.toy_problem import ToyProblem, toy_problem
from ddpo.credit.advantages import AdvantageConfig
from ddpo.objectives import PolicyGradientConfig
from ddpo.path_kl import full_noise_kl
from ddpo.policy import Policy
from ddpo.sampling.samplers import SamplerConfig, transition
from ddpo.sampling.schedule import PredictionType
from ddpo.sampling.step_selection import StepSelection

NUM_PATHS, NUM_WEIGHTS, NUM_CHUNKS, NUM_KL_PATHS = 60_000, 6, 30, 8_000
CHAIN_PATHS, CHAIN_WEIGHTS = 30_000, 12
"""Where chains are differentiated too: fewer paths, at more weights, as z-scores at one of them go up together."""
BIAS_TOLERANCE = 0.03
"""Of a length or a cosine, about three standard errors."""

COMPLETED = replace(REINFORCE, noise_free_steps="pathwise")
PLAIN = AdvantageConfig(baseline="batch", scale="none", clip=None)
DDIM = SamplerConfig(num_steps=10, guidance_scale=1.0)
FLOW = SamplerConfig(kind="flow_sde", num_steps=10, eta=0.7, guidance_scale=1.0)
DDIM_PRETRAINED = SamplerConfig(num_steps=10, guidance_scale=1.0, last_step="pretrained")
DDIM_NOISY = SamplerConfig(num_steps=10, guidance_scale=1.0, last_step="noisy")
FLOW_NOISY = SamplerConfig(kind="flow_sde", num_steps=10, eta=0.7, guidance_scale=1.0, last_step="noisy")


ENDS = (("noisy end", DDIM_NOISY), ("noise-free end", DDIM), ("pretrained end", DDIM_PRETRAINED))


def window(start: int) -> SamplerConfig:
    """DDIM with noise in three steps."""
    selection = StepSelection(kind="window", size=3, start=start, shift_every_epochs=0)
    return SamplerConfig(num_steps=10, guidance_scale=1.0, stochastic_steps=selection)


def random_window() -> SamplerConfig:
    """DDIM with noise in three steps that are drawn anew for every epoch."""
    selection = StepSelection(kind="random_window", size=3)
    return SamplerConfig(num_steps=10, guidance_scale=1.0, stochastic_steps=selection)


def compared(
    sampler: SamplerConfig,
    objective: PolicyGradientConfig = REINFORCE,
    *,
    epochs: int = 1,
    num_paths: int = NUM_PATHS,
    num_weights: int = NUM_WEIGHTS,
) -> GradientComparison:
    """An objective's gradient of the shared head, the mean over some epochs, at a few random weights."""
    each = num_paths // (epochs * num_weights)

    def one(seed: int, epoch: int) -> GradientComparison:
        problem = toy_problem(sampler=sampler, head="shared", epoch=epoch)
        paths = draw_paths(problem, num_paths=each, chunk_size=each // NUM_CHUNKS, seed=seed)
        return compare_gradients(paths, objective, PLAIN)

    return joined([pooled([one(seed, epoch) for epoch in range(epochs)]) for seed in range(num_weights)])


def completed(sampler: SamplerConfig, *, epochs: int = 1) -> GradientComparison:
    """The same with the derivative through the steps without noise added."""
    return compared(sampler, COMPLETED, epochs=epochs, num_paths=CHAIN_PATHS, num_weights=CHAIN_WEIGHTS)


def bias_row(name: str, found: GradientComparison) -> Measurement:
    """The measured gradient's length and cosine to the whole one, against what the missing part predicts."""
    predicted, measured = (length_and_cosine(each, found.exact) for each in (found.visible, found.estimate))
    return Measurement(
        name=f"{name}: length, cosine to the whole gradient",
        exact="predicted {:.3f}, {:.3f}".format(*predicted),
        obtained="{:.3f}, {:.3f}".format(*measured),
        error=max(abs(one - other) for one, other in zip(predicted, measured, strict=True)),
        tolerance=BIAS_TOLERANCE,
    )


def whole_rows(name: str, found: GradientComparison) -> Iterator[Measurement]:
    """The measured gradient against the whole one: z-scores, and its length and cosine, which are 1."""
    yield z_row(f"{name}, pathwise: the whole gradient", found)
    length, cosine = length_and_cosine(found.estimate, found.exact)
    yield Measurement(
        name=f"{name}, pathwise: length, cosine to the whole gradient",
        exact="1, 1",
        obtained=f"{length:.3f}, {cosine:.3f}",
        error=max(abs(length - 1), 1 - cosine),
        tolerance=BIAS_TOLERANCE,
    )


# ---- J and its gradient from the network's own steps ----------------------------------------------------------------


def network_value(problem: ToyProblem, policy: Policy) -> float:
    """J of the policy's network: its steps at basis vectors are affine maps, and means and covariances follow them."""
    module = copy.deepcopy(policy.denoiser.module).double()
    pretrained = copy.deepcopy(module)
    for parameter in pretrained.head.parameters():
        torch.nn.init.zeros_(parameter)
    dims = len(problem.mean)
    basis = torch.cat([torch.zeros(1, dims), torch.eye(dims)]).double()
    mean, cov, kl = np.zeros(dims), np.eye(dims), 0.0
    kind: PredictionType = "flow" if module.config.is_flow else "sample"
    for k in range(problem.schedule.num_steps):
        time = problem.schedule.model_time[k].expand(len(basis))
        with torch.no_grad():
            images, stock = (
                transition(problem.schedule, k, basis, network(basis, time)[0], kind=kind).mean.numpy()
                for network in (pretrained if k in problem.schedule.pretrained_steps else module, pretrained)
            )
        difference, variance = images - stock, float(problem.schedule.std[k]) ** 2
        if variance > 0:
            gain, shift = (difference[1:] - difference[0]).T, difference[0]
            kl += (np.sum((gain @ mean + shift) ** 2) + np.trace(gain @ cov @ gain.T)) / (2 * variance)
        gain, shift = (images[1:] - images[0]).T, images[0]
        mean, cov = gain @ mean + shift, gain @ cov @ gain.T + variance * np.eye(dims)
    P, q = problem.reward.P.numpy(), problem.reward.q.numpy()
    return float(-0.5 * (mean @ P @ mean + np.trace(P @ cov)) + q @ mean - problem.alpha * kl)


def finite_differences(problem: ToyProblem, policy: Policy, *, step: float = 1e-3) -> NDArray[np.float64]:
    """The gradient of `network_value` over all weights of the head, gains before shifts, (P,)."""
    slopes = []
    weights = policy.trainable()
    with torch.no_grad():
        for name in ("head.gain", "head.shift"):
            flat = weights[name].view(-1)
            for i in range(len(flat)):
                middle, ends, values = float(flat[i]), [], []
                for sign in (1, -1):
                    flat[i] = middle + sign * step
                    ends.append(float(flat[i]))  # as float32 rounds it
                    values.append(network_value(problem, policy))
                flat[i] = middle
                slopes.append((values[0] - values[1]) / (ends[0] - ends[1]))
    return np.array(slopes)


# ---- the checks -----------------------------------------------------------------------------------------------------


def check_exact() -> Iterator[Measurement]:
    """The closed form, noise-free steps included, against finite differences of the network's own steps."""
    for name, sampler in (*ENDS, ("window of 3 steps", window(3))):
        problem = toy_problem(sampler=sampler, head="shared")
        paths = draw_paths(problem, num_paths=2, chunk_size=2)
        gain, shift = paths.gain.clone().requires_grad_(), paths.shift.clone().requires_grad_()
        exact = torch.cat([one.flatten() for one in torch.autograd.grad(problem.value(gain, shift), (gain, shift))])
        found = finite_differences(problem, paths.policy)
        error = float(np.abs(found - exact.numpy()).max() / exact.norm())
        yield Measurement(name=f"{name}: largest error / length", exact="closed form", obtained="finite differences",
                          error=error, tolerance=1e-5)  # fmt: skip


def check_all_noisy() -> Iterator[Measurement]:
    """Every step has noise."""
    yield z_row(f"REINFORCE at {NUM_WEIGHTS} weights", compared(DDIM_NOISY))


def check_pretrained_end() -> Iterator[Measurement]:
    """The last step has no noise and is made by the pretrained weights."""
    yield z_row(f"REINFORCE at {NUM_WEIGHTS} weights", compared(DDIM_PRETRAINED))


def check_pathwise() -> Iterator[Measurement]:
    """The chain rule sees every step, with noise or without."""
    problem = toy_problem(sampler=DDIM, head="shared")
    drawn = [draw_paths(problem, num_paths=6_000, chunk_size=200, seed=seed) for seed in range(4)]
    found = joined([pathwise_gradients(paths) for paths in drawn])
    yield z_row("noise-free last step, against the whole gradient", found)


def check_all_noisy_flow() -> Iterator[Measurement]:
    """The same for the flow SDE."""
    yield z_row(f"REINFORCE at {NUM_WEIGHTS} weights", compared(FLOW_NOISY))


def check_last_step() -> Iterator[Measurement]:
    """DDIM's last step has no noise."""
    found = compared(DDIM)
    yield z_row("against the noisy steps' gradient", found.against_visible())
    yield bias_row("last of 10 steps", found)
    yield from whole_rows("last of 10 steps", completed(DDIM))


def check_windows() -> Iterator[Measurement]:
    """Three of ten steps have noise."""
    for start in (0, 3, 6):
        found = compared(window(start))
        yield z_row(f"steps {start}-{start + 2}, the noisy steps' gradient", found.against_visible())
        yield bias_row(f"steps {start}-{start + 2}", found)
        yield from whole_rows(f"steps {start}-{start + 2}", completed(window(start)))


def check_full_noise_kl() -> Iterator[Measurement]:
    """The KL that all steps would have, at the states of a chain with a window, against its closed form."""
    problem = toy_problem(sampler=window(3), head="shared")
    paths = draw_paths(problem, num_paths=NUM_KL_PATHS, chunk_size=NUM_KL_PATHS)
    (path,) = paths.chunks
    assert path.kl is not None
    full = toy_problem(head="shared")
    visited = problem.chain(paths.gain, paths.shift)
    exact = step_kls(full.chain(paths.gain, paths.shift), full.reference, visited=visited)
    for name, kl, expected in (
        (
            "full noise, " + paths.policy.full_noise.schedule.named_stochastic_steps,
            full_noise_kl(paths.policy, path),
            exact,
        ),
        ("path KL, " + problem.schedule.named_stochastic_steps, path.kl, step_kls(visited, problem.reference)),
    ):
        found = kl.double()
        error = found.std(0) / NUM_KL_PATHS**0.5
        z = ((found.mean(0) - expected) / error.clamp(min=1e-12)).abs().max()
        yield Measurement(name=f"{name}: nats, largest z of a step", exact=float(expected.sum()),
                          obtained=float(found.sum(1).mean()), error=float(z), tolerance=4.0)  # fmt: skip


def check_random_windows() -> Iterator[Measurement]:
    """The mean over four epochs, each with its own three steps."""
    found = compared(random_window(), epochs=4)
    yield z_row("4 epochs, the noisy steps' gradients", found.against_visible())
    yield bias_row("4 epochs", found)
    yield from whole_rows("4 epochs", completed(random_window(), epochs=4))


CHECKS = (
    Check(name="shared weights, exact", group="gradient", level="full", run=check_exact,
          claim="The exact gradient over weights that all steps share is that of the network's own steps."),
    Check(name="shared weights, all noisy", group="gradient", level="full", run=check_all_noisy,
          claim="Where every step has noise, the gradient over shared weights is complete (DDIM with a noisy end)."),
    Check(name="shared weights, pretrained last step", group="gradient", level="fast", run=check_pretrained_end,
          claim="Where the pretrained weights make a last step without noise, the gradient is complete."),
    Check(name="shared weights, noise-free last step", group="gradient", level="fast", run=check_last_step,
          claim="A last step without noise hides its part of the gradient; what is seen lacks what is predicted, and "
                "noise_free_steps: pathwise adds it."),
    Check(name="shared weights, pathwise", group="gradient", level="full", run=check_pathwise,
          claim="Differentiating the chain itself, as a reward gradient does, gives the whole gradient."),
    Check(name="full-noise KL", group="gradient", level="fast", run=check_full_noise_kl,
          claim="The KL of all steps with noise is measured at a window's states, whose path KL sees three steps."),
    Check(name="shared weights, random windows", group="gradient", level="slow", run=check_random_windows,
          claim="Windows drawn anew each epoch keep the bias of the steps outside them: it does not average out."),
    Check(name="shared weights, all noisy, flow", group="gradient", level="full", run=check_all_noisy_flow,
          claim="With a noisy end the flow SDE's gradient over shared weights is complete."),
    Check(name="shared weights, windows", group="gradient", level="full", run=check_windows,
          claim="A window hides the gradient through the steps outside it; what is seen lacks what is predicted, and "
                "noise_free_steps: pathwise adds it."),
)  # fmt: skip
