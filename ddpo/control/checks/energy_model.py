"""An energy model by likelihood and by score matching, where data are and where they are not."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.diffusion.energy_model import EnergyModel, grid_points, maximum_likelihood, score_matching
from ddpo.control.problems.mixture import GaussianMixture, gaussian_mixture

LAW = gaussian_mixture([0.3, 0.7], [[-3.0], [3.0]], [0.5, 0.7])
NOISE = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
NUM_DATA, REACH, THRESHOLD = 500, 5.0, 0.01


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a model compares with the law that it was to learn: the data's, smoothed where matching smooths it.

    Attributes:
        model: The model.
        dense: E |s - s*|^2 / E |s*|^2 where the data's density is at least a hundredth of its maximum, |x| <= 5.
        sparse: The same elsewhere in |x| <= 5.
        left: Its probability of x < 0.
        exact_left: The law's.
    """

    model: EnergyModel
    dense: float
    sparse: float
    left: float
    exact_left: float


@cache
def fit(noise_std: float) -> Fit:
    """The fit at a noise level; 0 for maximum likelihood, which has none."""
    data = LAW.sample(NUM_DATA, torch.Generator().manual_seed(0))[:, 0].numpy()
    model = score_matching(data, noise_std=noise_std) if noise_std else maximum_likelihood(data)
    return judged(model, LAW.marginal(1.0, noise_std))


def judged(model: EnergyModel, law: GaussianMixture) -> Fit:
    """A model against a law."""
    x = grid_points()
    x = x[np.abs(x) <= REACH]
    points = torch.from_numpy(x)[:, None]
    exact, density = law.score(points)[:, 0].numpy(), LAW.log_prob(points).numpy()
    dense = density >= density.max() + np.log(THRESHOLD)
    missed, size = (model.score(x) - exact) ** 2, exact**2
    zero = torch.zeros(1, dtype=torch.float64)
    return Fit(
        model=model,
        dense=float(missed[dense].sum() / size[dense].sum()),
        sparse=float(missed[~dense].sum() / size[~dense].sum()),
        left=model.mass(lambda grid: grid < 0),
        exact_left=float(law.cdf(zero)),
    )


def check_regions() -> Iterator[Measurement]:
    """Relative squared errors of the score, of 500 data."""
    likelihood, small, large = fit(0.0), fit(0.1), fit(1.0)
    ratio = likelihood.sparse / likelihood.dense
    yield Measurement(name="likelihood: error elsewhere / where data are", exact="> 2", obtained=ratio,
                      error=max(2 - ratio, 0.0), tolerance=0.0)  # fmt: skip
    for name, found, bound in (
        ("sigma 1, where data are", large.dense, 0.01),
        ("sigma 1, elsewhere", large.sparse, 0.01),
    ):
        yield Measurement(name=f"matching, {name}", exact=0.0, obtained=found, error=found, tolerance=bound)
    yield Measurement(name="matching, sigma .1, elsewhere", exact="> 1", obtained=small.sparse,
                      error=max(1 - small.sparse, 0.0), tolerance=0.0)  # fmt: skip


def check_mode_weights() -> Iterator[Measurement]:
    """The share of the left mode."""
    for name, noise in (("likelihood", 0.0), ("matching, sigma 1", 1.0)):
        found = fit(noise)
        yield Measurement(name=name, exact=found.exact_left, obtained=found.left,
                          error=abs(found.left - found.exact_left), tolerance=0.04)  # fmt: skip
    small = fit(0.1)
    off = abs(small.left - small.exact_left)
    yield Measurement(name="matching, sigma .1: off by", exact="> 0.2", obtained=off, error=max(0.2 - off, 0.0),
                      tolerance=0.0)  # fmt: skip


CHECKS = (
    Check(name="energy model, regions", group="score_matching", level="fast", run=check_regions,
          claim="Likelihood is least accurate where data are rare; matching with a large sigma is accurate there too."),
    Check(name="energy model, mode weights", group="score_matching", level="fast", run=check_mode_weights,
          claim="Likelihood knows how much weight each mode has; matching with a small sigma does not."),
)  # fmt: skip
