"""Gaussian mixtures against torch.distributions and autograd."""

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from ddpo.control.problems.mixture import GaussianMixture, gaussian_mixture


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture(dim, num=3):
    generator = seeded(dim)
    roots = torch.randn(num, dim, dim, dtype=torch.float64, generator=generator)
    covs = roots @ roots.transpose(1, 2) + 0.3 * torch.eye(dim, dtype=torch.float64)
    weights = torch.rand(num, dtype=torch.float64, generator=generator) + 0.1
    means = 2 * torch.randn(num, dim, dtype=torch.float64, generator=generator)
    return GaussianMixture(weights=weights / weights.sum(), means=means, covs=covs)


def stock(law):
    return MixtureSameFamily(Categorical(law.weights), MultivariateNormal(law.means, law.covs))


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_density_is_that_of_torch_distributions(dim):
    law = mixture(dim)
    x = 3 * torch.randn(50, dim, dtype=torch.float64, generator=seeded(1))
    assert torch.allclose(law.log_prob(x), stock(law).log_prob(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_score_is_the_gradient_of_the_stock_density(dim):
    law = mixture(dim)
    x = (3 * torch.randn(50, dim, dtype=torch.float64, generator=seeded(2))).requires_grad_()
    exact = torch.autograd.grad(stock(law).log_prob(x).sum(), x)[0]
    assert torch.allclose(law.score(x.detach()), exact, rtol=1e-10, atol=1e-10)


def test_score_is_finite_where_every_density_underflows():
    law = gaussian_mixture([0.5, 0.5], [[-1.0], [1.0]], [0.1, 0.1])
    x = torch.tensor([[100.0]], dtype=torch.float64)
    assert law.score(x).item() == pytest.approx(-(100 - 1) / 0.01)


def test_samples_have_the_mean_and_the_mode_weights():
    law = gaussian_mixture([0.2, 0.8], [[-5.0, 1.0], [5.0, 0.0]], [1.0, 0.5])
    samples = law.sample(40_000, seeded(3))
    error = (samples.mean(0) - law.mean()) / (samples.std(0) / math.sqrt(len(samples)))
    assert error.abs().max() < 4
    assert (samples[:, 0] < 0).double().mean().item() == pytest.approx(0.2, abs=0.01)


def test_noised_samples_follow_the_marginal():
    law = mixture(2)
    clean = law.sample(40_000, seeded(4))
    noisy = 0.6 * clean + 0.8 * torch.randn(clean.shape, dtype=torch.float64, generator=seeded(5))
    noised = law.marginal(0.6, 0.8)
    fresh = noised.sample(40_000, seeded(6))
    for moment in (lambda x: x, lambda x: x[:, :1] * x, lambda x: x.square()):
        difference = moment(noisy).mean(0) - moment(fresh).mean(0)
        spread = (moment(noisy).var(0) + moment(fresh).var(0)).sqrt() / 200
        assert (difference / spread).abs().max() < 4.5


def test_marginal_of_one_gaussian_is_its_convolution():
    noised = gaussian_mixture([1.0], [[2.0]], [3.0]).marginal(0.5, 2.0)
    x = torch.tensor([[0.3]], dtype=torch.float64)
    exact = torch.distributions.Normal(1.0, math.sqrt(0.25 * 9 + 4)).log_prob(x[:, 0])
    assert torch.allclose(noised.log_prob(x), exact.double(), rtol=1e-6)


def test_cdf_is_the_integral_of_the_density():
    law = mixture(1)
    grid = torch.linspace(-15, 1.0, 20_001, dtype=torch.float64)
    integral = torch.trapezoid(law.log_prob(grid[:, None]).exp(), grid)
    assert law.cdf(grid[-1:]).item() == pytest.approx(integral.item(), abs=1e-7)


@pytest.mark.parametrize(
    ("weights", "stds", "message"),
    [
        ([0.5, 0.6], [1.0, 1.0], "sum to 1"),
        ([0.5, 0.5], [1.0, 0.0], "positive definite"),
        ([1.0], [1.0, 1.0], "disagree"),
    ],
)
def test_impossible_mixtures_are_refused(weights, stds, message):
    with pytest.raises(ValueError, match=message):
        gaussian_mixture(weights, [[0.0], [1.0]], stds)
