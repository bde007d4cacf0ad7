"""The reward's gradient through the real trainer, and what the published ways to shorten it leave out.

With the whole chain in the graph the fixed point is the optimum of J, to the noise of Adam's last steps. With the last
K steps it is that of these steps alone: the exact gap of a chain whose other steps stay pretrained. DRTune drops the
network's Jacobian: its gradient is then that of a chain whose network sees the sampled states, whatever the weights do
to them, which finite differences of that frozen chain show.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.checks.gradient import z_row
from ddpo.control.diffusion.chain import objective, quadratic, relative_gap
from ddpo.control.diffusion.gradient_check import (
    Paths,
    draw_paths,
    joined,
    make_experience,
    pathwise_gradients,
    reward_gradient,
    trained_rows,
)
from ddpo.control.diffusion.toy_problem import ToyProblem, mixture_problem, toy_problem, truncated
from ddpo.credit.advantages import AdvantageConfig
from ddpo.objectives.reward_gradient import RewardGradientConfig
from ddpo.sampling.samplers import SamplerConfig
from ddpo.trajectory import Trajectory
from trainers.verification.optimum import Recipe, affine_gap, measured, mixture_gap

GAP_BAR = 1e-4
MIXTURE_BAR = 2e-3
DRAFT = Recipe(
    objective=RewardGradientConfig(recompute_steps=False),
    samples_per_epoch=512,
    epochs=150,
    learning_rate=0.15,
    ema_decay=0.95,
)
FLOW = SamplerConfig(kind="flow_sde", num_steps=10, eta=0.7, guidance_scale=1.0)
ODE = SamplerConfig(kind="ode", num_steps=10, guidance_scale=1.0)


def check_optimum() -> Iterator[Measurement]:
    """The whole chain, DDIM, d = 4."""
    yield measured(f"draft, {DRAFT.num_paths:,} paths", affine_gap(toy_problem(), DRAFT), GAP_BAR)


def check_mixture() -> Iterator[Measurement]:
    """A network on bimodal data."""
    recipe = replace(DRAFT, samples_per_epoch=256, epochs=250, learning_rate=0.05, ema_decay=0.98)
    yield measured(f"draft, {recipe.num_paths:,} paths", mixture_gap(mixture_problem(), recipe), MIXTURE_BAR)


def check_truncation() -> Iterator[Measurement]:
    """DRaFT-5 of 10 steps: the gap that the trainer reaches, and that of the chain that it should converge to."""
    recipe = replace(DRAFT, objective=RewardGradientConfig(last_steps=5, recompute_steps=False), epochs=100)
    problem = one_dimensional(curvature=2.0)
    exact, obtained = truncated_gap(problem, 5), affine_gap(problem, recipe)
    yield Measurement(name="gap of DRaFT-5", exact=f"{exact:.4f}", obtained=f"{obtained:.4f}",
                      error=abs(obtained - exact), tolerance=GAP_BAR)  # fmt: skip


def one_dimensional(*, curvature: float) -> ToyProblem:
    """N(1, .5^2) and r = -curvature x^2 / 2 - x at alpha .5, ten steps of DDIM with eta 1."""
    return ToyProblem(
        mean=torch.ones(1, dtype=torch.float64),
        cov=torch.full((1, 1), 0.25, dtype=torch.float64),
        reward=quadratic(torch.tensor([[curvature]]), torch.tensor([-1.0])),
        alpha=0.5,
        sampler=SamplerConfig(num_steps=10, guidance_scale=1.0),
    )


def truncated_gap(problem: ToyProblem, num_steps: int) -> float:
    """The exact gap of what the gradient through the last steps converges to."""
    chains = (truncated(problem, num_steps), problem.reference)
    value, start = (float(objective(each, problem.reference, problem.reward, problem.alpha)) for each in chains)
    return relative_gap(value, problem.optimum.objective, start)


def check_noise_free() -> Iterator[Measurement]:
    """Shared weights on the ODE, where no step has a likelihood."""
    problem = toy_problem(sampler=ODE, head="shared")
    drawn = [draw_paths(problem, num_paths=4_000, chunk_size=200, seed=seed) for seed in range(2)]
    yield z_row("reward gradient on the ODE, 2 weights", joined([pathwise_gradients(paths) for paths in drawn]))


def check_drtune() -> Iterator[Measurement]:
    """The objective's gradient against finite differences of the chain with frozen inputs of the network."""
    paths = draw_paths(toy_problem(sampler=FLOW), num_paths=256, chunk_size=256)
    config = RewardGradientConfig(preset="drtune", trained_steps=10, early_stop=0.0)
    (path,), (scores,) = paths.chunks, paths.scores
    experience, _ = make_experience(path, scores, AdvantageConfig(baseline="batch"), alpha=0.0)
    ours, whole = (
        reward_gradient(paths.policy, experience, each.build(), paths.problem, rows=trained_rows(paths))
        for each in (config, RewardGradientConfig())
    )
    frozen = frozen_differences(paths, path)
    error = float((ours - frozen).norm() / frozen.norm())
    yield Measurement(name="gradient, relative to its length", exact="finite differences, inputs frozen",
                      obtained=f"{error:.1e}", error=error, tolerance=1e-3)  # fmt: skip
    apart = float((whole - frozen).norm() / frozen.norm())
    yield Measurement(name="the network's Jacobian would add", exact="> 0.01", obtained=f"{apart:.2f}",
                      error=0.01 / apart, tolerance=1.0)  # fmt: skip


def frozen_differences(paths: Paths, path: Trajectory, *, step: float = 1e-5) -> Tensor:
    """The gradient of the mean reward of a chain whose network sees the sampled states, (P,) float64."""
    rows = trained_rows(paths)
    gain, shift = paths.gain, paths.shift
    slopes = [torch.zeros_like(gain), torch.zeros_like(shift)]
    for weights, slope in zip((gain, shift), slopes, strict=True):
        for place in torch.cartesian_prod(*(torch.arange(size) for size in weights.shape)).tolist():
            kept = float(weights[tuple(place)])
            ends = []
            for change in (step, -step):
                moved = weights.clone()
                moved[tuple(place)] = kept + change
                ends.append(_frozen_value(paths, path, *((moved, shift) if weights is gain else (gain, moved))))
            slope[tuple(place)] = (ends[0] - ends[1]) / (2 * step)
    return torch.cat([slope[rows].flatten() for slope in slopes])


def _frozen_value(paths: Paths, path: Trajectory, gain: Tensor, shift: Tensor) -> float:
    """The mean reward of a head's weights, with noise and the network's inputs as sampled.

    With the velocity held at what it is at y, x0_hat and eps_hat move as x does: a step's mean is that of the affine
    chain at y, and (a' + direction) (x - y).
    """
    schedule, states = paths.problem.schedule, path.latents.double()
    chain, sampled = (paths.problem.chain(*head) for head in ((gain, shift), (paths.gain, paths.shift)))
    x = states[:, 0]
    for k in range(schedule.num_steps):
        y = states[:, k]
        noise = states[:, k + 1] - (y @ sampled.F[k].T + sampled.g[k])
        x = y @ chain.F[k].T + chain.g[k] + (schedule.a_next[k] + schedule.direction[k]) * (x - y) + noise
    return float(paths.problem.reward(x).mean())


CHECKS = (
    Check(name="optimum", group="reward gradient", level="full", run=check_optimum,
          claim="Through the whole chain the trainer reaches the optimum of E[r] - alpha sum KL (Gaussian data)."),
    Check(name="mixture", group="reward gradient", level="full", run=check_mixture,
          claim="A network on bimodal data reaches the optimum that dynamic programming knows."),
    Check(name="truncation", group="reward gradient", level="full", run=check_truncation,
          claim="DRaFT-K is off by what the steps outside its graph would have gained."),
    Check(name="noise-free steps", group="reward gradient", level="full", run=check_noise_free,
          claim="Steps without a likelihood are differentiated like all others: the ODE's gradient is exact."),
    Check(name="DRTune", group="reward gradient", level="fast", run=check_drtune,
          claim="DRTune's gradient has no Jacobian of the network."),
)  # fmt: skip
