"""Steering at inference, against the exact tilt p(x_T) exp(r / alpha) / Z of the chain's own terminal law."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.diffusion.chain import marginals, tilted_terminal
from ddpo.control.diffusion.toy_pipeline import from_pixels
from ddpo.control.diffusion.toy_problem import ToyProblem, toy_problem
from ddpo.policy import Policy
from ddpo.seeds import sample_seeds
from ddpo.steered import steered_ends
from ddpo.steering.base import Draw, Selection
from ddpo.steering.feynman_kac import FeynmanKac
from ddpo.steering.particles import particle_seeds
from ddpo.steering.svdd import Svdd

_Z, _ALPHA, _GROUPS = 4.0, 1.0, 600
_STEPS = (2, 4, 6, 8)


class ForgetfulFeynmanKac:
    """The published mistake: weights are dropped where nothing is resampled."""

    def __init__(self, inner: FeynmanKac) -> None:
        self.inner = inner
        self.propose = inner.propose

    def select(self, draw: Draw, policy: Policy) -> Selection:
        """As of the inner one, which then forgets."""
        selection = self.inner.select(draw, policy)
        then = selection.then
        assert isinstance(then, FeynmanKac) and then.carried is not None
        if draw.state.k != policy.schedule.num_steps - 1:
            then = replace(then, carried=replace(then.carried, log_weights=torch.zeros_like(then.carried.log_weights)))
        return replace(selection, then=ForgetfulFeynmanKac(then))


def exact_log_z(problem: ToyProblem, alpha: float) -> float:
    """Log E exp(r(x_T) / alpha) under the pretrained chain: a Gaussian integral."""
    means, covs = marginals(problem.reference)
    mean, precision = means[-1], torch.linalg.inv(covs[-1])
    total = precision + problem.reward.P / alpha
    slope = precision @ mean + problem.reward.q / alpha
    exponent = 0.5 * slope @ torch.linalg.solve(total, slope) - 0.5 * mean @ precision @ mean
    spread = 0.5 * (torch.logdet(precision) - torch.logdet(total))
    return float(exponent + spread + problem.reward.c / alpha)


def feynman_kac(problem: ToyProblem, *, particles: int, threshold: float, potential: str = "difference") -> FeynmanKac:
    """Of a toy problem's reward."""
    return FeynmanKac(
        score=lambda images, rows: problem.reward(from_pixels(images.double())), alpha=_ALPHA, particles=particles,
        steps=_STEPS, potential=potential, threshold=threshold,  # type: ignore[arg-type]
    )  # fmt: skip


@torch.no_grad()
def run_particles(
    problem: ToyProblem, steer: FeynmanKac, *, groups: int = _GROUPS, seed: int = 0, forget: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Estimates of log Z (G,), weights (G, P) that sum to 1, and ends (G, P, d)."""
    policy = problem.policy()
    seeds = particle_seeds(sample_seeds(seed, 0, range(groups)), steer.particles)
    first = ForgetfulFeynmanKac(steer) if forget else steer
    ends, last = steered_ends(policy, policy.encode([""] * len(seeds)), seeds, first)
    last = last.inner if isinstance(last, ForgetfulFeynmanKac) else last
    assert isinstance(last, FeynmanKac)
    return last.log_z(), last.log_weights().softmax(1), ends.double().view(groups, steer.particles, -1)


def z_score(values: Tensor, exact: float) -> float:
    """How many standard errors the mean of values (G,) is off."""
    return abs(float(values.mean()) - exact) / float(values.std() / math.sqrt(len(values)))


def check_feynman_kac() -> Iterator[Measurement]:
    """Z, the mean and the second moment; and the mistake."""
    problem = toy_problem(2)
    log_z = exact_log_z(problem, _ALPHA)
    mean, cov = tilted_terminal(problem.reference, problem.reward, _ALPHA)
    for name, threshold in (("every time", 1.0), ("by effective size", 0.5)):
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
    found, _, _ = run_particles(problem, feynman_kac(problem, particles=8, threshold=0.5), forget=True)
    off = z_score((found - log_z).exp(), 1.0)
    yield Measurement(
        name="weights forgotten, as published", exact=f"above {_Z:g} standard errors", obtained=f"{off:.1f}",
        error=_Z / off, tolerance=1.0,
    )  # fmt: skip


def check_rate() -> Iterator[Measurement]:
    """The rms error of log Z at 16 and 64 particles."""
    problem, rms = toy_problem(2), []
    log_z = exact_log_z(problem, _ALPHA)
    for particles in (16, 64):
        found, _, _ = run_particles(problem, feynman_kac(problem, particles=particles, threshold=0.5), groups=400)
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


CHECKS = (
    Check(name="Feynman-Kac", group="steering", level="fast", run=check_feynman_kac,
          claim="Z is unbiased, moments are the tilted law's, in standard errors; forgetting weights is biased."),
    Check(name="rate", group="steering", level="full", run=check_rate,
          claim="The error of log Z falls as 1 / sqrt(particles)."),
    Check(name="best of N", group="steering", level="fast", run=check_best_of_n,
          claim="The KL of the best of N is log N - (N - 1) / N for a continuous reward."),
    Check(name="SVDD", group="steering", level="full", run=check_svdd,
          claim="At infinite temperature SVDD is the plain sampler, in standard errors."),
)  # fmt: skip
