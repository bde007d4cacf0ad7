"""Preferences against laws that are known: what the logistic loss finds, and what errors of the network make of it.

Exact log-ratios    pairs of N(0, 1), labels by Bradley and Terry from r: the minimiser over N(m, s^2) is p exp(r) / Z
One noise level     data N(0, 1), flow matching at one t, x = a z + t eps, a = 1 - t; the pretrained velocity is c x,
                    c = (t - a) / (a^2 + t^2), the trained one (c + slope) x + shift. Then, with shift 0,
                        d(z, eps) = slope^2 x^2 + 2 slope x (c x - eps + z)
                    and its mean over eps is [ a^2 slope (slope + 2 c) + 2 a slope ] z^2, plus a constant. For
                    r = -x^2 / 2 the tilted law is N(0, 1/2); at the beta at which its slope makes the mean's logit
                    r_w - r_l, the mean is exact. One eps is not, by Jensen. For r = b x the tilted law's velocity has
                    the shift -b t / (a^2 + t^2), which one eps finds at beta (a^2 + t^2) / t.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.diffusion.chain import quadratic
from ddpo.control.diffusion.toy_pipeline import head_scale
from ddpo.control.diffusion.toy_problem import ToyProblem, toy_problem
from ddpo.credit.baselines import leave_one_out
from ddpo.objectives import Experience, Models, Objective
from ddpo.objectives.pairs import preference_loss
from ddpo.objectives.preference import NoisedPairs, PreferenceConfig, Preset
from ddpo.policy import Policy
from ddpo.rollout import rollout
from ddpo.sampling.samplers import SamplerConfig
from ddpo.seeds import sample_seeds
from ddpo.trajectory import Keep, Samples

STEP = 1  # of three, with t = 1/2


# ---- exact log-ratios ------------------------------------------------------------------------------------------------


def check_exact() -> Iterator[Measurement]:
    """The minimiser of the logistic loss over mean and log standard deviation, in its standard errors."""
    curvature, slope, count = 0.8, 0.6, 100_000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, count, generator=generator, dtype=torch.float64)
    reward = -0.5 * curvature * x.square() + slope * x
    first = torch.rand(count, generator=generator, dtype=torch.float64) < torch.sigmoid(reward[0] - reward[1])
    better, worse = torch.where(first, x[0], x[1]), torch.where(first, x[1], x[0])

    def loss(parameters: Tensor) -> Tensor:
        mean, log_std = parameters

        def log_ratio(x: Tensor) -> Tensor:
            return -0.5 * ((x - mean) / log_std.exp()).square() - log_std + 0.5 * x.square()

        return preference_loss(log_ratio(better) - log_ratio(worse)).mean()

    found = minimum(loss, [torch.zeros(2, dtype=torch.float64, requires_grad=True)])[0]
    errors = torch.linalg.inv(torch.func.hessian(loss)(found) * count).diagonal().sqrt()
    target = {"mean": slope / (1 + curvature), "log std": -0.5 * math.log(1 + curvature)}
    for (name, exact), value, error in zip(target.items(), found.tolist(), errors.tolist(), strict=True):
        yield Measurement(name=f"{name}, {count:,} pairs", exact=exact, obtained=value,
                          error=abs(value - exact) / error, tolerance=3.5)  # fmt: skip


def minimum(loss: Callable[..., Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Where a smooth loss of some tensors is least, started from them."""
    optimizer = torch.optim.LBFGS(list(parameters), max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(*parameters)
        value.backward()
        return value.detach()

    optimizer.step(closure)
    return [parameter.detach() for parameter in parameters]


# ---- one noise level -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Level:
    """One noise level t of flow matching on N(0, 1) data."""

    t: float

    @property
    def a(self) -> float:
        """Signal level."""
        return 1 - self.t

    @property
    def power(self) -> float:
        """Variance of x."""
        return self.a**2 + self.t**2

    @property
    def pretrained(self) -> float:
        """Slope c of the pretrained velocity."""
        return (self.t - self.a) / self.power

    @property
    def target(self) -> float:
        """By how much the slope of the velocity of N(0, 1/2) is larger."""
        return (self.t - self.a / 2) / (self.a**2 / 2 + self.t**2) - self.pretrained

    def of_mean(self, slope: float) -> float:
        """Factor of z^2 in the mean of d."""
        return self.a**2 * slope * (slope + 2 * self.pretrained) + 2 * self.a * slope

    @property
    def beta(self) -> float:
        """At which the mean is exact for r = -x^2 / 2."""
        return 1 / self.of_mean(self.target)


@cache
def nodes(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the mean over a standard normal variable."""
    points, weights = np.polynomial.hermite_e.hermegauss(count)
    return points, weights / weights.sum()


def own_optimum(level: Level, *, averaged: bool) -> float:
    """The slope that minimises the logistic loss for r = -x^2 / 2, from the formula of d alone."""
    if averaged:
        return level.target
    points, weights = nodes(40)
    z, other, eps = np.meshgrid(points, points, points, indexing="ij")
    weight = np.einsum("i,j,k->ijk", weights, weights, weights)
    preferred = 1 / (1 + np.exp(0.5 * (z**2 - other**2)))

    def loss(slope: float) -> float:
        def change(z: np.ndarray) -> np.ndarray:
            x = level.a * z + level.t * eps
            return slope**2 * x**2 + 2 * slope * x * (level.pretrained * x - eps + z)

        return float((weight * preferred * np.logaddexp(0, 0.5 * level.beta * (change(z) - change(other)))).sum())

    return float(minimize_scalar(loss, bounds=(0, 2), method="bounded", options={"xatol": 1e-9}).x)


def small_problem(curvature: float, slope: float) -> ToyProblem:
    """Data N(0, 1) and a flow of three steps."""
    return ToyProblem(
        mean=torch.zeros(1, dtype=torch.float64),
        cov=torch.eye(1, dtype=torch.float64),
        reward=quadratic(torch.tensor([[curvature]]), torch.tensor([slope])),
        alpha=1.0,
        sampler=SamplerConfig(kind="flow_sde", num_steps=3, eta=0.7, guidance_scale=1.0),
    )


def quadrature_batch(problem: ToyProblem, policy: Policy, *, draws: int) -> NoisedPairs:
    """All pairs of nodes with their probability as weight; eps at nodes, or at +-1, of which d has the same mean."""
    points, weights = (torch.from_numpy(values) for values in nodes(20))
    ends = (points, weights) if draws == 1 else (torch.zeros(1).double(), torch.ones(1).double())
    z, other, eps = (grid.flatten() for grid in torch.meshgrid(points, points, ends[0], indexing="ij"))
    weight = torch.einsum("i,j,k->ijk", weights, weights, ends[1]).flatten()
    weight = weight * torch.sigmoid(problem.reward(z[:, None]) - problem.reward(other[:, None]))
    noise = eps[:, None] if draws == 1 else torch.tensor([1.0, -1.0]).expand(len(z), 2)
    return NoisedPairs(
        steps=torch.full((len(z), draws), STEP),
        better=z[:, None].float(),
        worse=other[:, None].float(),
        eps=noise[..., None].float(),
        weight=(weight * len(z)).float(),
        condition=policy.encode([""]).index(torch.zeros(2 * len(z), dtype=torch.int64)),
    )


def found_velocity(problem: ToyProblem, *, beta: float, draws: int) -> tuple[float, float]:
    """Slope and shift of the velocity that minimise the objective's own loss at the level, less the pretrained ones."""
    policy = problem.policy()
    objective: Objective[Any] = PreferenceConfig(beta=beta, draws=draws).build()
    batch = quadrature_batch(problem, policy, draws=draws)

    def loss(*weights: Tensor) -> Tensor:
        (loss,) = objective.losses(Models(policy=policy), batch)
        return loss.value

    moved = -head_scale(problem.schedule, problem.head)[STEP] / problem.schedule.s[STEP]
    gain, shift = (
        float(found[STEP].flatten()[0] * moved) for found in minimum(loss, list(policy.trainable().values()))
    )
    return gain, shift


def level_of(problem: ToyProblem) -> Level:
    """The noise level that is looked at."""
    return Level(t=float(problem.schedule.s[STEP]))


def check_linear() -> Iterator[Measurement]:
    """A linear reward at one noise level, the same eps for both."""
    problem = small_problem(0.0, 0.7)
    level = level_of(problem)
    slope, shift = found_velocity(problem, beta=level.power / level.t, draws=1)
    exact = -0.7 * level.t / level.power
    yield Measurement(name="one noise: shift of the velocity", exact=exact, obtained=shift,
                      error=max(abs(slope), abs(shift - exact)), tolerance=2e-3)  # fmt: skip


def check_bound() -> Iterator[Measurement]:
    """Each variant meets its own optimum, and how far that is from the tilted law's is part of the row."""
    problem = small_problem(1.0, 0.0)
    level = level_of(problem)
    for name, draws in (("one noise", 1), ("mean over noises", 2)):
        slope, _ = found_velocity(problem, beta=level.beta, draws=draws)
        exact = own_optimum(level, averaged=draws > 1)
        off = f"{exact - level.target:+.3f} from the tilted law's {level.target:.3f}"
        yield Measurement(name=f"{name}: slope, {off}", exact=exact, obtained=slope, error=abs(slope - exact),
                          tolerance=1e-3)  # fmt: skip


# ---- likes and dislikes ----------------------------------------------------------------------------------------------


def check_likes() -> Iterator[Measurement]:
    """Where nothing is trained yet, likes and dislikes pull where the best and the worst of groups do."""
    problem, count = toy_problem(4), 4096
    policy = problem.policy()
    path = rollout(policy, policy.encode([""] * count), sample_seeds(0, 0, range(count)), keep=Keep.FINAL)
    scores = problem.score(policy.decode(path.final), [], [])
    groups = torch.arange(count) // 8
    experience = Experience(
        samples=Samples(prompts=("",) * count, metadata=({},) * count, trajectory=path),
        start=0,
        scores=scores,
        groups=groups,
        advantages=leave_one_out(scores, groups)[:, None],
        kl_weight=torch.zeros(count),
        penalised=False,
    )

    def gradient(preset: Preset) -> Tensor:
        objective: Objective[Any] = PreferenceConfig(preset=preset, beta=1.0).build()
        batch = objective.gather(experience, torch.arange(count), torch.zeros(count, dtype=torch.int64), seed=0)
        (loss,) = objective.losses(Models(policy=policy, surveyed=torch.zeros(())), batch)
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss.value, [*policy.trainable().values()])])

    cosine = float(torch.cosine_similarity(gradient("dpo"), gradient("kto"), dim=0))
    yield Measurement(
        name="cosine of the two gradients", exact="> 0.9", obtained=cosine, error=1 - cosine, tolerance=0.1
    )


CHECKS = (
    Check(name="exact log-ratios", group="preference", level="fast", run=check_exact,
          claim="The logistic loss of exact log-ratios finds the reward-tilted law (errors in standard errors)."),
    Check(name="DPO, linear reward", group="preference", level="fast", run=check_linear,
          claim="Diffusion-DPO with one noise for both is exact for a linear reward on Gaussian data."),
    Check(name="DPO, quadratic reward", group="preference", level="fast", run=check_bound,
          claim="For a quadratic one it meets its own optimum, which one noise in the sigmoid keeps off the target."),
    Check(name="KTO", group="preference", level="fast", run=check_likes,
          claim="At the pretrained weights the gradient of likes and dislikes is that of pairs, but for its length."),
)  # fmt: skip
