"""Denoising score matching against exact scores of smoothed mixtures."""

import pytest
import torch
from scipy.stats import kstest

from ddpo.control.diffusion.score_matching import (
    denoising_loss,
    kolmogorov_distance,
    langevin,
    learn_score,
    score_error,
)
from ddpo.control.problems.mixture import gaussian_mixture

DATA = gaussian_mixture([0.3, 0.7], [[-3.0, 0.0], [3.0, 0.0]], [0.5, 0.7])
HIGH = torch.tensor([6.0, 4.0], dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def networks():
    data = DATA.sample(20_000, seeded())
    return {std: learn_score(data, noise_std=std, generator=seeded(1), num_steps=1000) for std in (0.1, 2.0)}


def judged(score, noise_std):
    return score_error(score, DATA, noise_std=noise_std, low=-HIGH, high=HIGH, generator=seeded(2))


def test_smoothed_score_minimises_the_denoising_loss():
    std, data = 0.7, DATA.sample(200_000, seeded(3))
    smoothed = DATA.marginal(1.0, std)

    def loss(score):
        return denoising_loss(score, data, noise_std=std, generator=seeded(4)).item()

    best = loss(smoothed.score)
    assert best < loss(DATA.score) - 0.01
    assert best < loss(lambda x: 1.1 * smoothed.score(x))
    assert best < loss(lambda x: smoothed.score(x) + 0.1)


def test_loss_exceeds_its_minimum_by_half_the_squared_score_error():
    std, data = 0.7, DATA.sample(200_000, seeded(3))
    smoothed = DATA.marginal(1.0, std)
    losses = [
        denoising_loss(score, data, noise_std=std, generator=seeded(4)).item()
        for score in (lambda x: smoothed.score(x) + 0.5, smoothed.score)
    ]
    assert losses[0] - losses[1] == pytest.approx(0.5 * 2 * 0.25, abs=0.01)


def test_score_is_learned_where_data_are(networks):
    assert judged(networks[0.1], 0.1).high_density < 0.06
    assert judged(networks[2.0], 2.0).high_density < 0.006


def test_large_noise_learns_low_density_regions_and_small_noise_does_not(networks):
    small, large = judged(networks[0.1], 0.1), judged(networks[2.0], 2.0)
    assert large.low_density < 0.006
    assert small.low_density > 5 * large.low_density
    assert small.low_density > 2 * small.high_density


def test_langevin_with_the_learned_score_samples_the_smoothed_law(networks):
    start = HIGH * (2 * torch.rand(2000, 2, dtype=torch.float64, generator=seeded(5)) - 1)
    samples = langevin(networks[2.0], start, step_size=0.1, num_steps=500, generator=seeded(6))
    smoothed = DATA.marginal(1.0, 2.0)
    assert max(kolmogorov_distance(samples, smoothed, axis) for axis in (0, 1)) < 0.06
    assert kolmogorov_distance(samples, DATA) > 0.12


def test_langevin_does_not_find_the_weights_of_modes_far_apart():
    law = DATA.marginal(1.0, 0.1)
    start = HIGH * (2 * torch.rand(1000, 2, dtype=torch.float64, generator=seeded(5)) - 1)
    samples = langevin(law.score, start, step_size=0.02, num_steps=300, generator=seeded(6))
    assert (samples[:, 0] < 0).double().mean().item() > 0.38


def test_kolmogorov_distance_is_scipys():
    samples = DATA.sample(500, seeded(7))
    exact = kstest(samples[:, 0].numpy(), lambda x: DATA.cdf(torch.from_numpy(x)).numpy()).statistic
    assert kolmogorov_distance(samples, DATA) == pytest.approx(exact, abs=1e-12)


def test_no_noise_is_refused():
    with pytest.raises(ValueError, match="positive"):
        learn_score(DATA.sample(10, seeded()), noise_std=0.0, generator=seeded())
