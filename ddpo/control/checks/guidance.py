"""Steering that moves the means or the states, where the law that comes out is known in closed form.

Guidance by a value is held to the Riccati control of the linear-Gaussian chain; guidance by r(x0_hat) to the affine
chain that it makes there; Langevin corrections to the law that they converge to at a fixed step.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.checks.steering import z_score
from ddpo.control.diffusion.chain import AffineChain, marginals, quadratic, tilted_terminal
from ddpo.control.diffusion.toy_pipeline import from_pixels
from ddpo.control.diffusion.toy_problem import ToyProblem, toy_problem
from ddpo.policy import Policy
from ddpo.sampling.samplers import SamplerConfig
from ddpo.seeds import sample_seeds
from ddpo.steered import steered_ends
from ddpo.steering.base import Draw, State
from ddpo.steering.langevin import Langevin
from ddpo.steering.reward_gradient import RewardGradient
from ddpo.steering.value import ValueGradient
from ddpo.trajectory import Condition

_Z = 4.0  # standard errors
_ROWS = 4000


def state_at(policy: Policy, k: int, x: Tensor) -> State:
    """Where chains in the states x (B, d) stand before step k."""
    condition = policy.encode([""] * len(x))
    prediction = policy.predict(k, x, condition)
    return State(
        k=k, x=x, prediction=prediction, gaussian=policy.distribution(k, prediction), condition=condition,
        seeds=sample_seeds(0, 0, range(len(x))),
    )  # fmt: skip


@torch.no_grad()
def control_error(problem: ToyProblem, k: int, *, rounds: int) -> float:
    """How far guidance by the exact value moves the mean of step k from the optimum's, relative to how far that is."""
    policy, best = problem.policy(), problem.optimum

    def value(k: int, x: Tensor, condition: Condition) -> Tensor:
        return best.values[k](x.double())

    means, covs = marginals(best.chain)
    generator = torch.Generator().manual_seed(k)
    normal = torch.randn(200, len(means[k]), dtype=torch.float64, generator=generator)
    x = (means[k] + normal @ torch.linalg.cholesky(covs[k]).T).float()
    state = state_at(policy, k, x)
    found = ValueGradient(value=value, alpha=problem.alpha, rounds=rounds).propose(state, policy).mean.double()
    exact = x.double() @ best.chain.F[k].T + best.chain.g[k]
    own = x.double() @ problem.reference.F[k].T + problem.reference.g[k]
    return float((found - exact).norm() / (own - exact).norm())


def check_value_guidance() -> Iterator[Measurement]:
    """Implicit: the Riccati control. Explicit: off, half as much with twice the steps."""
    errors = [control_error(toy_problem(2), k, rounds=60) for k in range(9)]
    yield Measurement(
        name="implicit form, largest of 9 steps", exact="the Riccati control", obtained="same to (relative)",
        error=max(errors), tolerance=1e-4,
    )  # fmt: skip
    counts = (40, 80, 160)
    problems = [toy_problem(2, sampler=SamplerConfig(num_steps=count, guidance_scale=1.0)) for count in counts]
    off = [control_error(one, count // 2, rounds=0) for one, count in zip(problems, counts, strict=True)]
    for few, many, (count, twice) in zip(off, off[1:], zip(counts, counts[1:], strict=False), strict=False):
        yield Measurement(
            name=f"explicit form's error, {count} over {twice} steps ({few:.3f}, {many:.3f})", exact=2.0,
            obtained=few / many, error=abs(few / many - 2.0), tolerance=0.25,
        )  # fmt: skip


def guided_chain(problem: ToyProblem, alpha: float) -> AffineChain:
    """What guidance by r(x0_hat) makes of Gaussian data: x0_hat = A x + b, so a step's mean moves by an affine map.

    F + std^2 / alpha A' (-P) A and g + std^2 / alpha A' (q - P b), at the steps with noise.
    """
    schedule, reference, reward = problem.schedule, problem.reference, problem.reward
    eye, F, g = torch.eye(len(problem.mean), dtype=torch.float64), [], []
    for k in range(schedule.num_steps):
        a, s, std = (float(values[k]) for values in (schedule.a, schedule.s, schedule.std))
        A = a * problem.cov @ torch.linalg.inv(a**2 * problem.cov + s**2 * eye)
        b = problem.mean - a * A @ problem.mean
        F.append(reference.F[k] - std**2 / alpha * A.T @ reward.P @ A)
        g.append(reference.g[k] + std**2 / alpha * A.T @ (reward.q - reward.P @ b))
    return replace(reference, F=torch.stack(F), g=torch.stack(g))


def check_reward_gradient() -> Iterator[Measurement]:
    """The law that comes out is the affine chain's, and that is not the tilted law."""
    problem, alpha = toy_problem(2), 0.3
    means, covs = marginals(guided_chain(problem, alpha))
    target, spread = tilted_terminal(problem.reference, problem.reward, alpha)
    policy, seeds = problem.policy(), sample_seeds(0, 0, range(_ROWS))
    score = RewardGradient(score=lambda images, rows: problem.reward(from_pixels(images.double())), alpha=alpha)
    with torch.no_grad():
        ends, _ = steered_ends(policy, policy.encode([""] * _ROWS), seeds, score)
    for i in range(2):
        own, bias = ends.double()[:, i] - target[i], float(means[-1][i] - target[i])
        yield Measurement(
            name=f"mean of coordinate {i} less the tilted law's", exact=bias, obtained=float(own.mean()),
            error=z_score(own, bias), tolerance=_Z,
        )  # fmt: skip
    squares = (ends.double()[:, 0] - means[-1][0]).square() - spread[0, 0]
    excess = float(covs[-1][0, 0] - spread[0, 0])
    yield Measurement(
        name="variance of coordinate 0 less the tilted law's", exact=excess, obtained=float(squares.mean()),
        error=z_score(squares, excess), tolerance=_Z,
    )  # fmt: skip


@torch.no_grad()
def check_langevin() -> Iterator[Measurement]:
    """Corrections at one level on N(0, 1), until they have converged."""
    dims, k = 16, 5
    problem = replace(
        toy_problem(dims), mean=torch.zeros(dims, dtype=torch.float64), cov=torch.eye(dims, dtype=torch.float64),
        reward=quadratic(torch.zeros(dims, dims), torch.zeros(dims)),
    )  # fmt: skip
    policy = problem.policy()
    s = float(problem.schedule.s[k + 1])
    for h in (0.2, 0.8):
        steer = Langevin(score=lambda images, rows: rows, alpha=None, corrections=30, step=h / s**2, ratio=0.16)
        x = torch.randn(500, dims, generator=torch.Generator().manual_seed(0))
        state = state_at(policy, k, x)
        draw = Draw(state=state, proposal=state.gaussian, noise=x, is_noisy=True, candidates=x)
        squares = steer.select(draw, policy).latents.double().square().mean(1)
        exact = 1 / (1 - h / 2)
        yield Measurement(
            name=f"variance on N(0, 1) at step {h:g}", exact=exact, obtained=float(squares.mean()),
            error=z_score(squares, exact), tolerance=_Z,
        )  # fmt: skip


CHECKS = (
    Check(name="guidance by the value", group="steering", level="fast", run=check_value_guidance,
          claim="The implicit form is the Riccati control; the explicit one is off at first order in the step."),
    Check(name="guidance by r(x0_hat)", group="steering", level="fast", run=check_reward_gradient,
          claim="It misses the tilted law by what the affine chain says, in standard errors."),
    Check(name="Langevin", group="steering", level="fast", run=check_langevin,
          claim="Corrections at a fixed step h converge to the variance 1 / (1 - h / 2) on N(0, 1)."),
)  # fmt: skip
