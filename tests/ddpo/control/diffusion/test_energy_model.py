"""Energy models: the fits are the optima of their objectives, and err where they are said to."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import minimize

from ddpo.control.checks.energy_model import CHECKS, LAW
from ddpo.control.diffusion.energy_model import EnergyModel, maximum_likelihood, score_matching

DATA = LAW.sample(200, torch.Generator().manual_seed(1))[:, 0].numpy()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_the_check_passes(check):
    found = list(check.run())
    assert found and [one for one in found if not one.passed] == []


def test_the_score_is_the_slope_of_a_density_that_integrates_to_one():
    model = maximum_likelihood(DATA)
    x, step = np.array([-2.3, 0.1, 4.0]), 1e-5
    slope = (model.log_density(x + step) - model.log_density(x - step)) / (2 * step)
    assert model.score(x) == pytest.approx(slope, rel=1e-6, abs=1e-6)
    assert quad(lambda y: float(np.exp(model.log_density(np.array([y])))[0]), -9, 9, limit=200)[0] == pytest.approx(
        1.0, abs=1e-6
    )


def test_no_other_weights_have_more_likelihood():
    """scipy's BFGS, which knows values only, from the fit and from zero."""
    fitted = maximum_likelihood(DATA)

    def loss(weights):
        model = EnergyModel(weights=weights)
        return -model.log_density(DATA).mean() + 0.5e-5 * weights @ weights

    best = loss(fitted.weights)
    rng = np.random.default_rng(0)
    assert all(loss(fitted.weights + 0.01 * rng.normal(size=29)) > best for _ in range(20))
    found = minimize(loss, np.zeros(29), method="BFGS", options={"maxiter": 15})
    assert found.fun > best - 1e-9


def test_score_matching_minimises_the_denoising_loss_of_drawn_noise():
    sigma, rng = 0.5, np.random.default_rng(0)
    fitted = score_matching(DATA, noise_std=sigma)
    noise = rng.normal(size=(400, len(DATA)))
    noisy = (DATA + sigma * noise).ravel()

    def loss(model):
        return ((model.score(noisy) + noise.ravel() / sigma) ** 2).mean()

    best = loss(fitted)
    moved = [EnergyModel(weights=fitted.weights * factor) for factor in (0.9, 1.1)]
    assert all(loss(model) > best for model in moved)
    assert best < loss(maximum_likelihood(DATA))
