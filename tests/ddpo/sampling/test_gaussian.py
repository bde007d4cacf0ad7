"""The Gaussian of a step against torch.distributions and finite differences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, kl_divergence

from ddpo.sampling.gaussian import Gaussian

latent_shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3)
stds = st.floats(1e-3, 10.0)


def oracle(gaussian):
    std = torch.as_tensor(gaussian.std).double().expand_as(gaussian.mean)
    return Independent(Normal(gaussian.mean.double(), std), gaussian.mean.ndim - 1)


def draw(batch, latent, std, seed, *, per_sample=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    mean, other, noise = (torch.randn(batch, *latent, generator=generator, dtype=dtype) for _ in range(3))
    shape = (batch, *[1] * len(latent)) if per_sample else ()
    scale = (std * (1 + torch.rand(shape, generator=generator, dtype=dtype))).to(dtype)
    return Gaussian(mean=mean, std=scale), Gaussian(mean=mean + scale * other, std=scale), noise


@given(st.integers(1, 4), latent_shapes, stds, st.integers(0, 999), st.booleans())
def test_log_prob_equals_torch_distributions(batch, latent, std, seed, per_sample):
    gaussian, _, noise = draw(batch, latent, std, seed, per_sample=per_sample)
    x = gaussian.sample(noise)
    expected = oracle(gaussian).log_prob(x.double())
    assert gaussian.log_prob(x).shape == (batch,)
    # x - mean is rounded in units of x, the rest is amplified by 1 / std.
    tolerance = 1e-5 * (1 + expected.abs()) + 1e-6 * gaussian.mean[0].numel() / std
    assert ((gaussian.log_prob(x).double() - expected).abs() <= tolerance).all()


@given(st.integers(1, 4), latent_shapes, stds, st.integers(0, 999), st.booleans())
def test_kl_equals_torch_distributions(batch, latent, std, seed, per_sample):
    gaussian, other, _ = draw(batch, latent, std, seed, per_sample=per_sample)
    expected = kl_divergence(oracle(gaussian), oracle(other))
    assert gaussian.kl(other).shape == (batch,)
    torch.testing.assert_close(gaussian.kl(other).double(), expected, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 3), latent_shapes, st.integers(0, 999))
def test_log_prob_and_kl_equal_torch_distributions_to_rounding_in_float64(batch, latent, seed):
    gaussian, other, noise = draw(batch, latent, 0.1, seed, dtype=torch.float64)
    x = gaussian.sample(noise)
    torch.testing.assert_close(gaussian.log_prob(x), oracle(gaussian).log_prob(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gaussian.kl(other), kl_divergence(oracle(gaussian), oracle(other)), rtol=1e-12, atol=0)


def test_gradients_of_log_prob_and_kl_equal_finite_differences():
    mean, other, x = (torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    std = torch.tensor([0.3, 1.7], dtype=torch.float64).reshape(2, 1, 1)

    def log_prob(mean, x):
        return Gaussian(mean=mean, std=std).log_prob(x)

    def kl(mean, other):
        return Gaussian(mean=mean, std=std).kl(Gaussian(mean=other, std=std))

    assert torch.autograd.gradcheck(log_prob, (mean, x))
    assert torch.autograd.gradcheck(kl, (mean, other))


def test_samples_have_the_mean_and_std_of_the_gaussian():
    gaussian, _, _ = draw(2, [3], 0.5, 0)
    samples = torch.stack([gaussian.sample(noise) for noise in torch.randn(2000, 2, 3)])
    torch.testing.assert_close(samples.mean(0), gaussian.mean, rtol=0, atol=0.1)
    torch.testing.assert_close(samples.std(0), gaussian.std.expand(2, 3), rtol=0.1, atol=0)


@pytest.mark.parametrize("dims", [16_384, 262_144, 2_096_640], ids=["image", "large image", "video"])
def test_the_log_ratio_of_two_close_policies_is_right_at_every_size(dims):
    """Both log-probabilities are large, and their difference is not: a float32 of the last size is .125 nats wide."""
    generator = torch.Generator().manual_seed(0)
    mean, noise, moved = (torch.randn(1, dims, generator=generator) for _ in range(3))
    old = Gaussian(mean=mean, std=torch.tensor(0.1))
    new = Gaussian(mean=mean + 1e-5 * moved, std=old.std)
    x = old.sample(noise)
    ratio = new.log_prob(x) - old.log_prob(x)
    expected = oracle(new).log_prob(x.double()) - oracle(old).log_prob(x.double())
    torch.testing.assert_close(ratio, expected, rtol=0, atol=1e-3)
    assert expected.abs() > 5e-3


def test_log_prob_of_float32_has_a_float32_gradient():
    gaussian, _, noise = draw(2, [3, 2], 0.5, 0)
    mean = gaussian.mean.requires_grad_()
    x = gaussian.sample(noise).detach()
    (gradient,) = torch.autograd.grad(gaussian.log_prob(x).sum(), mean)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, (x - mean) / gaussian.std**2)


def test_log_prob_is_a_sum_and_not_a_mean_over_dimensions():
    small, large = (Gaussian(mean=torch.zeros(1, d), std=torch.tensor(1.0)) for d in (10, 1000))
    ratio = large.log_prob(torch.ones(1, 1000)) / small.log_prob(torch.ones(1, 10))
    torch.testing.assert_close(ratio, torch.tensor([100.0], dtype=torch.float64))
