"""An energy model p(x) ~ exp(-E(x)), fitted by maximum likelihood and by denoising score matching: where each is wrong.

    E(x) = x^2 / (2 w^2) - sum_j theta_j phi_j(x),     phi_j a bump at c_j       (an exponential family; convex to fit)

    likelihood    max  mean log p(x_i)                                     exact: Z is a sum over a grid
    matching      min  E 1/2 |s(x + sigma e) + e / sigma|^2, s = -E'       exact: quadratic in theta

Likelihood weighs every place by the density of the data, so what is between the modes, or beyond them, has no say.
Matching is of the data smoothed by sigma: with a small sigma it knows no more there, and does not even learn how much
weight each mode has, which only the score in between tells; a large sigma puts noisy data everywhere (Song and Ermon,
arXiv:1907.05600). One dimension, N data, J bumps, float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_REACH, _SPACING = 9.0, 0.01
_CENTRES, _WIDTH, _CONFINEMENT = np.linspace(-7.0, 7.0, 29), 0.6, 4.0
_RIDGE = 1e-5
_NEWTON_STEPS, _HERMITE_NODES = 100, 24


@dataclass(frozen=True, kw_only=True)
class EnergyModel:
    """A fitted model.

    Attributes:
        weights: theta, (J,).
    """

    weights: Vector

    def score(self, x: Vector) -> Vector:
        """-E', (n,), at points (n,)."""
        return -x / _CONFINEMENT**2 + _slopes(x) @ self.weights

    def log_density(self, x: Vector) -> Vector:
        """The log of p, (n,), normalised on [-9, 9]."""
        return self._negative_energy(x) - self._log_partition()

    def mass(self, inside: Callable[[Vector], NDArray[np.bool_]]) -> float:
        """The probability of a set."""
        grid = grid_points()
        density = np.exp(self.log_density(grid))
        return float(density[inside(grid)].sum() * _SPACING)

    def _negative_energy(self, x: Vector) -> Vector:
        return -(x**2) / (2 * _CONFINEMENT**2) + _bumps(x) @ self.weights

    def _log_partition(self) -> float:
        values = self._negative_energy(grid_points())
        top = float(values.max())
        return top + float(np.log(np.exp(values - top).sum() * _SPACING))


def grid_points() -> Vector:
    """Where integrals are taken, (n,)."""
    return np.arange(-_REACH, _REACH + _SPACING / 2, _SPACING)


def maximum_likelihood(data: Vector) -> EnergyModel:
    """The model of largest likelihood of data (N,), less a small ridge, by Newton's method with halved steps."""
    grid, bumps, mean = grid_points(), _bumps(grid_points()), _bumps(data).mean(0)
    model = EnergyModel(weights=np.zeros(len(_CENTRES)))

    def loss(candidate: EnergyModel) -> float:
        theta = candidate.weights
        return candidate._log_partition() - float(mean @ theta) + 0.5 * _RIDGE * float(theta @ theta)

    for _ in range(_NEWTON_STEPS):
        share = np.exp(model.log_density(grid)) * _SPACING
        expected = share @ bumps
        slope = expected - mean + _RIDGE * model.weights
        curvature = (bumps - expected).T @ (share[:, None] * (bumps - expected)) + _RIDGE * np.eye(len(slope))
        step, size, before = np.linalg.solve(curvature, slope), 1.0, loss(model)
        while loss(moved := EnergyModel(weights=model.weights - size * step)) > before and size > 1e-6:
            size /= 2
        model = moved
        if float(np.abs(slope).max()) < 1e-9:
            break
    return model


def score_matching(data: Vector, *, noise_std: float) -> EnergyModel:
    """The model of smallest denoising loss on data (N,), less the same ridge; the noise is integrated out.

    Args:
        data: N numbers.
        noise_std: sigma, positive.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(_HERMITE_NODES)
    noise = np.tile(nodes, len(data))
    noisy = np.repeat(data, len(nodes)) + noise_std * noise
    share = np.tile(weights / weights.sum(), len(data)) / len(data)
    slopes, target = _slopes(noisy), noisy / _CONFINEMENT**2 - noise / noise_std
    gram = slopes.T @ (share[:, None] * slopes) + _RIDGE * np.eye(slopes.shape[1])
    return EnergyModel(weights=np.linalg.solve(gram, slopes.T @ (share * target)).astype(np.float64))


def _bumps(x: Vector) -> Vector:
    """phi, (n, J)."""
    values: Vector = np.exp(-0.5 * ((x[:, None] - _CENTRES) / _WIDTH) ** 2)
    return values


def _slopes(x: Vector) -> Vector:
    """phi', (n, J)."""
    return -(x[:, None] - _CENTRES) / _WIDTH**2 * _bumps(x)
