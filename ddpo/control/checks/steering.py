"""Steering at inference, against the exact tilt p(x_T) exp(r / alpha) / Z of the chain's own terminal law."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.diffusion.chain import marginals, optimum, tilted_terminal
from ddpo.control.diffusion.toy_pipeline import from_pixels
from ddpo.control.diffusion.toy_problem import MixtureProblem, ToyProblem, mixture_problem, toy_problem
from ddpo.policy import Policy
from ddpo.seeds import sample_seeds
from ddpo.steered import steered_ends, steered_samples
from ddpo.steering.base import Draw, Selection
from ddpo.steering.feynman_kac import FeynmanKac
from ddpo.steering.kinds import BestOfN
from ddpo.steering.particles import particle_seeds
from ddpo.steering.svdd import Svdd
from ddpo.trajectory import Condition

_Z, _ALPHA, _GROUPS = 4.0, 1.0, 600
_STEPS = (2, 4, 6, 8)


class ForgetfulFeynmanKac(FeynmanKac):
    """The published mistake: weights are dropped where nothing is resampled."""

    def select(self, draw: Draw, policy: Policy) -> Selection:
        """As it should be, but for what is carried on."""
        selection = super().select(draw, policy)
        then = selection.then
        assert isinstance(then, FeynmanKac) and then.carried is not None
        forgotten = replace(then.carried, log_weights=torch.zeros_like(then.carried.log_weights))
        return replace(selection, then=replace(then, carried=forgotten))


def exact_log_z(problem: ToyProblem, alpha: float) -> float:
    """Log E exp(r(x_T) / alpha) under the pretrained chain: a Gaussian integral."""
    means, covs = marginals(problem.reference)
    mean, precision = means[-1], torch.linalg.inv(covs[-1])
    total = precision + problem.reward.P / alpha
    slope = precision @ mean + problem.reward.q / alpha
    exponent = 0.5 * slope @ torch.linalg.solve(total, slope) - 0.5 * mean @ precision @ mean
    spread = 0.5 * (torch.logdet(precision) - torch.logdet(total))
    return float(exponent + spread + problem.reward.c / alpha)


def feynman_kac(
    problem: ToyProblem | MixtureProblem,
    *,
    particles: int,
    threshold: float,
    potential: str = "difference",
    method: type[FeynmanKac] = FeynmanKac,
) -> FeynmanKac:
    """Of a toy problem's reward."""
    return method(
        score=lambda images, rows: problem.reward(from_pixels(images.double())), alpha=_ALPHA, particles=particles,
        steps=_STEPS, potential=potential, threshold=threshold,  # type: ignore[arg-type]
    )  # fmt: skip


@torch.no_grad()
def run_particles(
    problem: ToyProblem | MixtureProblem, steer: FeynmanKac, *, groups: int = _GROUPS, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Estimates of log Z (G,), weights (G, P) that sum to 1, and ends (G, P, d)."""
    policy = problem.policy()
    seeds = particle_seeds(sample_seeds(seed, 0, range(groups)), steer.particles)
    ends, last = steered_ends(policy, policy.encode([""] * len(seeds)), seeds, steer)
    ends = ends.double()
    weights = last.weigh(problem.reward(ends).view(groups, -1))
    assert weights.log_z is not None
    return weights.log_z, weights.log_weights.softmax(1), ends.view(groups, steer.particles, -1)


def z_score(values: Tensor, exact: float) -> float:
    """How many standard errors the mean of values (G,) is off."""
    return abs(float(values.mean()) - exact) / float(values.std() / math.sqrt(len(values)))


def check_feynman_kac() -> Iterator[Measurement]:
    """Z, the mean and the second moment; and the mistake."""
    problem = toy_problem(2)
    log_z = exact_log_z(problem, _ALPHA)
    mean, cov = tilted_terminal(problem.reference, problem.reward, _ALPHA)
    for name, threshold in (("every time", 1.0), ("by effective size", 0.9)):
        found, weights, ends = run_particles(problem, feynman_kac(problem, particles=8, threshold=threshold))
        z = (found - log_z).exp()
        yield Measurement(
            name=f"E Z estimate / Z, resampled {name}", exact=1.0, obtained=float(z.mean()), error=z_score(z, 1.0),
            tolerance=_Z,
        )  # fmt: skip
        first = (z[:, None] * weights * (ends[..., 0] - mean[0])).sum(1)
        yield Measurement(
            name=f"mean of the tilted law, resampled {name}", exact=0.0, obtained=float(first.mean()),
            error=z_score(first, 0.0), tolerance=_Z,
        )  # fmt: skip
        second = (z[:, None] * weights * ((ends[..., 0] - mean[0]).square() - cov[0, 0])).sum(1)
        yield Measurement(
            name=f"variance of the tilted law, resampled {name}", exact=0.0, obtained=float(second.mean()),
            error=z_score(second, 0.0), tolerance=_Z,
        )  # fmt: skip
    forgetful = feynman_kac(problem, particles=8, threshold=0.5, method=ForgetfulFeynmanKac)
    found, _, _ = run_particles(problem, forgetful)
    off = z_score((found - log_z).exp(), 1.0)
    yield Measurement(
        name="weights forgotten, as published", exact=f"above {_Z:g} standard errors", obtained=f"{off:.1f}",
        error=_Z / off, tolerance=1.0,
    )  # fmt: skip


def check_mixture() -> Iterator[Measurement]:
    """Z where the chain's law is no Gaussian; and by the potentials of a value that is far from the soft one."""
    problem = mixture_problem(alpha=_ALPHA)
    log_z = problem.chain.log_z()
    plain = feynman_kac(problem, particles=8, threshold=1.0)

    def crude(k: int, x: Tensor, condition: Condition) -> Tensor:
        return problem.reward(x.double())

    for name, steer in (("r(x0_hat)", plain), ("r(x_k)", replace(plain, value=crude))):
        found, _, _ = run_particles(problem, steer)
        z = (found - log_z).exp()
        yield Measurement(
            name=f"E Z estimate / Z of a mixture, potentials of {name}", exact=1.0, obtained=float(z.mean()),
            error=z_score(z, 1.0), tolerance=_Z,
        )  # fmt: skip


def check_value_particles() -> Iterator[Measurement]:
    """Potentials of the exact soft value."""
    problem = toy_problem(2)
    values = optimum(problem.reference, problem.reward, _ALPHA, free_covariance=True).values

    def soft_value(k: int, x: Tensor, condition: Condition) -> Tensor:
        return values[k](x.double())

    steer = replace(feynman_kac(problem, particles=8, threshold=1.0), value=soft_value)
    found, _, _ = run_particles(problem, steer)
    z = (found - exact_log_z(problem, _ALPHA)).exp()
    yield Measurement(
        name="E Z estimate / Z, potentials of the soft value", exact=1.0, obtained=float(z.mean()),
        error=z_score(z, 1.0), tolerance=_Z,
    )  # fmt: skip


def check_rate() -> Iterator[Measurement]:
    """The rms error of log Z at 16 and 64 particles."""
    problem, rms = toy_problem(2), []
    log_z = exact_log_z(problem, _ALPHA)
    for particles in (16, 64):
        found, _, _ = run_particles(problem, feynman_kac(problem, particles=particles, threshold=1.0), groups=400)
        rms.append(float((found - log_z).square().mean().sqrt()))
    ratio = rms[0] / rms[1]
    yield Measurement(
        name="rms of log Z, 16 over 64 particles", exact=2.0, obtained=ratio, error=abs(ratio - 2.0), tolerance=0.35
    )


def check_best_of_n() -> Iterator[Measurement]:
    """The KL of the best of N of r = x on N(0, 1), by quadrature over its order statistic, against the formula."""
    num = 8
    x = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    best = num * density * torch.special.ndtr(x) ** (num - 1)
    kl = float(torch.trapezoid(best * (math.log(num) + (num - 1) * torch.special.log_ndtr(x)), x))
    bound = math.log(num) - (num - 1) / num
    yield Measurement(
        name=f"KL of the best of {num}, quadrature", exact=bound, obtained=kl, error=abs(kl - bound), tolerance=1e-8
    )


@torch.no_grad()
def check_svdd() -> Iterator[Measurement]:
    """At infinite temperature the candidates are chosen blindly."""
    problem = toy_problem(2)
    policy, seeds = problem.policy(), sample_seeds(0, 0, range(4000))
    steer = Svdd(score=lambda images, rows: problem.reward(from_pixels(images.double())), alpha=math.inf, candidates=3)
    ends, _ = steered_ends(policy, policy.encode([""] * len(seeds)), seeds, steer)
    means, covs = marginals(problem.reference)
    first = ends.double()[:, 0]
    mean, variance = float(means[-1][0]), float(covs[-1][0, 0])
    for name, values, exact in (("mean", first, mean), ("variance", (first - mean).square(), variance)):
        yield Measurement(
            name=f"{name} at infinite temperature, 3 candidates", exact=exact, obtained=float(values.mean()),
            error=z_score(values, exact), tolerance=_Z,
        )  # fmt: skip


@torch.no_grad()
def check_order_statistic() -> Iterator[Measurement]:
    """The mean reward of the best of N of a Gaussian one: the mean plus deviations of the largest of N normals."""
    num, problem = 8, toy_problem(2, kind="linear")
    means, covs = marginals(problem.reference)
    slope = problem.reward.q
    mean, std = float(problem.reward(means[-1][None])), float((slope @ covs[-1] @ slope).sqrt())
    x = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    largest = float(torch.trapezoid(x * num * density * torch.special.ndtr(x) ** (num - 1), x))
    made = steered_samples(
        problem.policy(), [""] * 1000, problem.score, steer=BestOfN(particles=num), batch_size=1000 * num
    )
    exact = mean + largest * std
    yield Measurement(
        name=f"mean reward of the best of {num}", exact=exact, obtained=float(made.scores.double().mean()),
        error=z_score(made.scores.double(), exact), tolerance=_Z,
    )  # fmt: skip


CHECKS = (
    Check(name="Feynman-Kac", group="steering", level="fast", run=check_feynman_kac,
          claim="Z is unbiased, moments are the tilted law's, in standard errors; forgetting weights is biased."),
    Check(name="Feynman-Kac on a mixture", group="steering", level="full", run=check_mixture,
          claim="Z is unbiased where the chain's law is no Gaussian, whatever the potentials, in standard errors."),
    Check(name="value as potential", group="steering", level="full", run=check_value_particles,
          claim="Potentials of a value leave Z unbiased, in standard errors."),
    Check(name="rate", group="steering", level="full", run=check_rate,
          claim="The error of log Z falls as 1 / sqrt(particles)."),
    Check(name="best of N", group="steering", level="fast", run=check_best_of_n,
          claim="The KL of the best of N is log N - (N - 1) / N for a continuous reward."),
    Check(name="best of N's reward", group="steering", level="fast", run=check_order_statistic,
          claim="The reward of the best of N is that of the largest order statistic, in standard errors."),
    Check(name="SVDD", group="steering", level="full", run=check_svdd,
          claim="At infinite temperature SVDD is the plain sampler, in standard errors."),
)  # fmt: skip
