"""Denoising score matching on a two-mode mixture in the plane."""

from collections.abc import Iterator
from functools import cache

import torch

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.diffusion.score_matching import (
    ScoreError,
    ScoreNetwork,
    kolmogorov_distance,
    langevin,
    learn_score,
    score_error,
)
from ddpo.control.problems.mixture import gaussian_mixture

_DATA = gaussian_mixture([0.3, 0.7], [[-3.0, 0.0], [3.0, 0.0]], [0.5, 0.7])
_HIGH = torch.tensor([6.0, 4.0], dtype=torch.float64)
_SMALL, _LARGE = 0.1, 2.0


@cache
def _network(noise_std: float) -> ScoreNetwork:
    data = _DATA.sample(20_000, torch.Generator().manual_seed(0))
    return learn_score(data, noise_std=noise_std, generator=torch.Generator().manual_seed(1), num_steps=1500)


def _error(noise_std: float) -> ScoreError:
    generator = torch.Generator().manual_seed(2)
    return score_error(_network(noise_std), _DATA, noise_std=noise_std, low=-_HIGH, high=_HIGH, generator=generator)


def _learned() -> Iterator[Measurement]:
    small, large = _error(_SMALL), _error(_LARGE)
    for name, obtained, tolerance in (
        (f"relative squared error, sigma {_SMALL}, where data are", small.high_density, 0.04),
        (f"relative squared error, sigma {_LARGE}, where data are", large.high_density, 0.005),
        (f"relative squared error, sigma {_LARGE}, elsewhere", large.low_density, 0.005),
    ):
        yield Measurement(name=name, exact=0.0, obtained=obtained, error=obtained, tolerance=tolerance)


def _coverage() -> Iterator[Measurement]:
    small, large = _error(_SMALL), _error(_LARGE)
    ratio = large.low_density / small.low_density
    yield Measurement(
        name=f"low-density error, sigma {_LARGE} / sigma {_SMALL} (which has {small.low_density:.3f})",
        exact="< 0.1",
        obtained=ratio,
        error=ratio,
        tolerance=0.1,
    )


def _samples() -> Iterator[Measurement]:
    generator = torch.Generator().manual_seed(3)
    start = _HIGH * (2 * torch.rand(2000, 2, dtype=torch.float64, generator=generator) - 1)
    samples = langevin(_network(_LARGE), start, step_size=0.1, num_steps=600, generator=generator)
    smoothed = _DATA.marginal(1.0, _LARGE)
    for axis in (0, 1):
        distance = kolmogorov_distance(samples, smoothed, axis)
        yield Measurement(
            name=f"KS distance of 2,000 Langevin samples, coordinate {axis}",
            exact=0.0,
            obtained=distance,
            error=distance,
            tolerance=0.05,
        )
    left = float((samples[:, 0] < 0).double().mean())
    exact = float(smoothed.cdf(torch.zeros(1, dtype=torch.float64)))
    yield Measurement(
        name="weight of the left half", exact=exact, obtained=left, error=abs(left - exact), tolerance=0.05
    )


CHECKS: tuple[Check, ...] = (
    Check(
        name="denoising",
        group="score_matching",
        claim="Regression on noise learns the exact score of the smoothed mixture.",
        level="full",
        run=_learned,
    ),
    Check(
        name="low density",
        group="score_matching",
        claim="Away from the data a large noise level learns the score and a small one does not.",
        level="full",
        run=_coverage,
    ),
    Check(
        name="langevin",
        group="score_matching",
        claim="Langevin dynamics with the learned score samples the smoothed mixture.",
        level="full",
        run=_samples,
    ),
)
