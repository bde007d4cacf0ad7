"""A critic as the baseline, on the chain where every policy's value function is an exact quadratic.

The table is of the chain at random weights, far from the pretrained and the optimal ones: the mean square of the
advantages at steps with noise, and how far the gradient of 64 samples is from the exact one, root mean square over its
length.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.checks.chain import random_head
from ddpo.control.checks.gradient import DDIM, REINFORCE, z_row
from ddpo.control.diffusion.chain import AffineChain, Quadratic
from ddpo.control.diffusion.gradient_check import (
    GROUP_SIZE,
    Paths,
    Values,
    compare_gradients,
    draw_paths,
    gradient_estimates,
    make_experience,
)
from ddpo.control.diffusion.policy_value import policy_values
from ddpo.control.diffusion.toy_problem import ToyProblem, toy_problem
from ddpo.credit.advantages import AdvantageConfig
from ddpo.trajectory import Trajectory

CRITIC = AdvantageConfig(baseline="critic", gae_lambda=1.0, scale="none")
LAMBDAS = (1.0, 0.95, 0.5)
NUM_PATHS, CHUNK_SIZE = 19_200, 64


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How much an estimator varies.

    Attributes:
        advantages: Mean square of the advantages at steps with noise, squared reward units.
        gradient: Root mean square distance of a chunk's gradient to the exact one, over that one's length.
    """

    advantages: float
    gradient: float


def values_of(quadratics: tuple[Quadratic, ...]) -> Values:
    """Value functions V_0 .. as a critic, of chains of vectors."""

    def values(path: Trajectory) -> Tensor:
        states = path.latents.double()
        return torch.stack([quadratics[k](states[:, k]) for k in range(path.schedule.num_steps)], dim=1)

    return values


def exact_values(paths: Paths) -> tuple[Quadratic, ...]:
    """Those of the policy that drew the paths."""
    problem = paths.problem
    chain = problem.chain(paths.gain, paths.shift)
    return policy_values(chain, problem.reference, problem.reward, problem.alpha)


def wrong_values(paths: Paths) -> tuple[Quadratic, ...]:
    """Those of the pretrained chain with another reward: far off, and functions of the state all the same."""
    problem = paths.problem
    reward = Quadratic(P=-problem.reward.P, q=2 * problem.reward.q, c=problem.reward.c + 3.0)
    return policy_values(problem.reference, problem.reference, reward, problem.alpha)


def spread_of(paths: Paths, config: AdvantageConfig, values: Values | None = None) -> Spread:
    """The spread of an estimator on paths in small chunks."""
    alpha = paths.problem.alpha
    each = torch.stack(list(gradient_estimates(paths, REINFORCE, config, alpha=alpha, values=values)))
    exact = compare_gradients(replace(paths, chunks=paths.chunks[:2], scores=paths.scores[:2]), REINFORCE, config,
                              values=values).exact  # fmt: skip
    noisy, squares = paths.policy.schedule.stochastic, []
    for path, scores in zip(paths.chunks, paths.scores, strict=True):
        expected = None if values is None else values(path)
        experience, _ = make_experience(path, scores, config, alpha, values=expected)
        squares.append(experience.advantages[:, noisy].double().square().mean())
    error = (each - exact).square().sum(1).mean().sqrt() / exact.norm()
    return Spread(advantages=float(torch.stack(squares).mean()), gradient=float(error))


def check_policy_values() -> Iterator[Measurement]:
    """The recursion against J, and against what sampled chains earned."""
    problem = toy_problem()
    gain, shift = random_head()
    chain = problem.chain(gain, shift)
    values = policy_values(chain, problem.reference, problem.reward, problem.alpha)
    exact, obtained = float(problem.value(gain, shift)), mean_value(values[0], chain)
    yield Measurement(name="E V_0(x_0) of a random policy", exact=exact, obtained=obtained,
                      error=abs(obtained - exact), tolerance=1e-10)  # fmt: skip
    best = problem.optimum
    again = policy_values(best.chain, problem.reference, problem.reward, problem.alpha)
    pairs = zip(again, best.values, strict=True)
    worst = max(float((one.P - two.P).abs().max() + (one.q - two.q).abs().max()) for one, two in pairs)
    yield Measurement(name="the optimum's, largest difference", exact="Riccati recursion", obtained=worst, error=worst,
                      tolerance=1e-10)  # fmt: skip


def mean_value(value: Quadratic, chain: AffineChain) -> float:
    """E V_0(x_0) under the prior."""
    return float(value.expectation(chain.prior_mean, chain.prior_cov))


def drawn(problem: ToyProblem | None = None) -> Paths:
    """Paths in chunks of 64 samples."""
    return draw_paths(problem or toy_problem(sampler=DDIM), num_paths=NUM_PATHS, chunk_size=CHUNK_SIZE)


def check_unbiased() -> Iterator[Measurement]:
    """z-scores of the gradient: at lambda 1 with any critic, below it with the exact one."""
    paths = drawn()
    exact, wrong = values_of(exact_values(paths)), values_of(wrong_values(paths))
    yield z_row("lambda 1, a wrong critic", compare_gradients(paths, REINFORCE, CRITIC, values=wrong))
    yield z_row("lambda 1, the exact critic", compare_gradients(paths, REINFORCE, CRITIC, values=exact))
    half = replace(CRITIC, gae_lambda=0.5)
    yield z_row("lambda 0.5, the exact critic", compare_gradients(paths, REINFORCE, half, values=exact))
    biased = compare_gradients(paths, REINFORCE, half, values=wrong)
    yield Measurement(name="lambda 0.5, a wrong critic", exact="biased: rms z above 2",
                      obtained=f"rms z {biased.rms_z:.2f}", error=2 / biased.rms_z, tolerance=1.0)  # fmt: skip


def check_variance() -> Iterator[Measurement]:
    """The table of baselines."""
    paths = drawn()
    exact = values_of(exact_values(paths))
    group, batch = (spread_of(paths, AdvantageConfig(baseline=kind, scale="none")) for kind in ("group", "batch"))
    more, exact_more = group.advantages / batch.advantages, (1 + 1 / (GROUP_SIZE - 1)) / (1 + 1 / (CHUNK_SIZE - 1))
    yield Measurement(name=f"Var A in groups of {GROUP_SIZE} over that in batches of {CHUNK_SIZE}", exact=exact_more,
                      obtained=more, error=abs(more / exact_more - 1), tolerance=0.03)  # fmt: skip
    yield spread_row(f"batch of {CHUNK_SIZE}", batch, bar=group)
    for gae_lambda in LAMBDAS:
        found = spread_of(paths, replace(CRITIC, gae_lambda=gae_lambda), exact)
        yield spread_row(f"exact critic, lambda {gae_lambda:g}", found, bar=batch)


def spread_row(name: str, found: Spread, *, bar: Spread) -> Measurement:
    """A spread as a row, which must be below another's."""
    return Measurement(
        name=f"{name}: Var A, rms gradient error",
        exact=f"below {bar.advantages:.3g}, {bar.gradient:.3g}",
        obtained=f"{found.advantages:.3g}, {found.gradient:.3g}",
        error=max(found.advantages / bar.advantages, found.gradient / bar.gradient),
        tolerance=1.0,
    )


CHECKS = (
    Check(name="policy values", group="critic", level="fast", run=check_policy_values,
          claim="The value function of a policy on the affine chain is this quadratic."),
    Check(name="unbiased", group="critic", level="full", run=check_unbiased,
          claim="Generalised advantages give the exact gradient at lambda 1 for any critic, below for the exact one."),
    Check(name="variance", group="critic", level="full", run=check_variance,
          claim="A critic's advantages and gradients vary less than those against other samples."),
)  # fmt: skip
