"""The evidence bound by weighted denoising score matching, against entropy, gap and likelihood by quadrature."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import quad, solve_ivp
from torch import Tensor

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.diffusion.elbo import TimedScore, denoising_bound
from ddpo.control.diffusion.time_reversal import VPSDE, TimeReversal
from ddpo.control.problems.mixture import gaussian_mixture

Points = NDArray[np.float64]

GAUSSIAN = TimeReversal(data=gaussian_mixture([1.0], [[0.7]], [0.5]), sde=VPSDE())
MIXTURE = TimeReversal(data=gaussian_mixture([0.3, 0.7], [[-1.5], [1.0]], [0.4, 0.6]), sde=VPSDE())


# ---- references, from the parameters alone --------------------------------------------------------------------------


def beta_integral(t: float) -> float:
    """Of the VP SDE's noise rate, from 0 to t."""
    return 0.1 * t + 0.5 * 19.9 * t * t


def density_and_score(problem: TimeReversal, x: Points, t: float) -> tuple[Points, Points]:
    """The noisy law's density and score at points, by hand."""
    a2 = math.exp(-beta_integral(t))
    weights, means = problem.data.weights.numpy()[:, None], math.sqrt(a2) * problem.data.means.numpy()
    variances = a2 * problem.data.covs[:, :, 0].numpy() + 1 - a2
    parts = weights * np.exp(-0.5 * (x - means) ** 2 / variances) / np.sqrt(2 * np.pi * variances)
    density = parts.sum(0)
    return density, (parts * (means - x) / variances).sum(0) / density


def entropy(problem: TimeReversal) -> float:
    """H(p_0), nats."""

    def integrand(x: float) -> float:
        density = float(density_and_score(problem, np.array([x]), 0.0)[0][0])
        return -density * math.log(density)

    return quad(integrand, -8, 8, limit=200, epsabs=1e-11)[0]


def gap(problem: TimeReversal, score: Callable[[Points, float, Points], Points]) -> float:
    """1/2 int beta E |s - s*|^2 dt along noisy data; the score is given the exact one too."""
    grid, spacing = np.linspace(-9, 9, 1801), 0.01

    def rate(t: float) -> float:
        density, exact = density_and_score(problem, grid, t)
        return 0.5 * (0.1 + 19.9 * t) * float(density @ (score(grid, t, exact) - exact) ** 2) * spacing

    nodes, lengths = np.polynomial.legendre.leggauss(24)
    return float(sum(0.5 * length * rate(0.5 * (node + 1)) for node, length in zip(nodes, lengths, strict=True)))


def affine_cross_entropy(factor: float, shift: float) -> float:
    """-E log p^s(y_0) of Gaussian data, s = factor s* + shift: the model's law is Gaussian, its moments an ODE."""
    mean, variance = 0.7, 0.25

    def marginal(t: float) -> tuple[float, float]:
        a2 = math.exp(-beta_integral(t))
        return math.sqrt(a2) * mean, a2 * variance + 1 - a2

    def backward(r: float, state: NDArray[np.float64]) -> list[float]:
        t = 1 - r
        beta, (m, v) = 0.1 + 19.9 * t, marginal(t)
        gain, constant = 0.5 * beta - beta * factor / v, beta * (factor * m / v + shift)
        return [gain * state[0] + constant, 2 * gain * state[1] + beta]

    end = solve_ivp(backward, (0, 1), marginal(1.0), method="DOP853", rtol=1e-11, atol=1e-13).y[:, -1]
    return 0.5 * math.log(2 * math.pi * end[1]) + (variance + (mean - end[0]) ** 2) / (2 * end[1])


# ---- scores and checks ----------------------------------------------------------------------------------------------


def exact_score(problem: TimeReversal) -> TimedScore:
    """The score of the noisy data at a forward time."""

    def score(y: Tensor, t: Tensor) -> Tensor:
        return problem.data.marginal(problem.sde.scale(t), problem.sde.std(t)).score(y)

    return score


def changed(score: TimedScore, *, factor: float = 1.0, shift: float = 0.0, wave: float = 0.0) -> TimedScore:
    """The score factor s + shift + wave sin(2 y + 3 t)."""
    return lambda y, t: factor * score(y, t) + shift + wave * torch.sin(2 * y + 3 * t)


def check_bound() -> Iterator[Measurement]:
    """L of exact and wrong scores is the entropy and the gap."""
    for name, problem in (("Gaussian", GAUSSIAN), ("mixture", MIXTURE)):
        best, lowest = exact_score(problem), entropy(problem)
        for label, score, missed in (
            ("s*", best, 0.0),
            ("1.2 s*", changed(best, factor=1.2), gap(problem, lambda x, t, exact: 1.2 * exact)),
            ("s* + sin(2 y + 3 t)", changed(best, wave=1.0),
             gap(problem, lambda x, t, exact: exact + np.sin(2 * x + 3 * t))),
        ):  # fmt: skip
            found = denoising_bound(problem, score)[0]
            yield Measurement(name=f"{name}, s = {label}: nats", exact=lowest + missed, obtained=found,
                              error=abs(found - lowest - missed), tolerance=1e-4)  # fmt: skip


def check_likelihood() -> Iterator[Measurement]:
    """L is above the likelihood of the model, and meets it at the exact score."""
    for factor, shift in ((1.0, 0.0), (1.2, 0.0), (0.8, 0.3)):
        bound = denoising_bound(GAUSSIAN, changed(exact_score(GAUSSIAN), factor=factor, shift=shift))[0]
        exact = affine_cross_entropy(factor, shift)
        below = max(exact - bound, 0.0) if (factor, shift) != (1.0, 0.0) else abs(exact - bound)
        yield Measurement(name=f"s = {factor:g} s* + {shift:g}: -E log p <= L, nats", exact=exact, obtained=bound,
                          error=below, tolerance=1e-5)  # fmt: skip


CHECKS = (
    Check(name="ELBO", group="elbo", level="fast", run=check_bound,
          claim="Denoising score matching of weight sigma^2 / 2 is the data's entropy plus the verification gap."),
    Check(name="likelihood", group="elbo", level="fast", run=check_likelihood,
          claim="It bounds the model's likelihood from its side, and meets it at the exact score."),
)  # fmt: skip
