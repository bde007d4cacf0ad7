"""The controller of the KL weight, and the seeds of samples."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpo.kl import AdaptiveKL, FixedKL, next_alpha
from ddpo.rollout import sample_seeds
from ddpo.validation import FieldError


@given(st.floats(0, 100), st.floats(0, 1e6), st.floats(1e-3, 10))
def test_a_fixed_weight_stays(alpha, path_kl, current):
    assert next_alpha(FixedKL(alpha=alpha), current, path_kl) == alpha


@given(st.floats(1e-3, 1e3), st.floats(1e-5, 1e2), st.floats(0, 1e4))
def test_an_adaptive_weight_moves_towards_the_target_by_at_most_the_rate(target, alpha, path_kl):
    config = AdaptiveKL(target=target, rate=0.2, min_alpha=1e-6, max_alpha=1e3)
    moved = math.log(next_alpha(config, alpha, path_kl) / alpha)
    expected = 0.2 * max(-1.0, min(1.0, path_kl / target - 1))
    assert math.isclose(moved, expected, rel_tol=1e-6, abs_tol=1e-9)


def test_an_adaptive_weight_stays_inside_its_bounds():
    config = AdaptiveKL(target=1.0, rate=5.0, alpha=0.1, min_alpha=0.05, max_alpha=0.2)
    assert next_alpha(config, 0.1, 100.0) == 0.2
    assert next_alpha(config, 0.1, 0.0) == 0.05


@pytest.mark.parametrize("path_kl", [math.nan, math.inf])
def test_an_adaptive_weight_refuses_a_kl_that_is_not_finite(path_kl):
    with pytest.raises(ValueError, match=f"cannot follow a path KL of {path_kl} nats"):
        next_alpha(AdaptiveKL(target=1.0), 0.01, path_kl)


def test_the_controller_finds_the_weight_whose_optimum_meets_the_target():
    """KL of the optimum falls as 1/alpha^2 here (linear reward, Gaussian reference): target 4 needs alpha = 0.5."""
    config, alpha = AdaptiveKL(target=4.0, alpha=10.0, rate=0.1), 10.0
    for _ in range(300):
        alpha = next_alpha(config, alpha, 1 / alpha**2)
    assert math.isclose(alpha, 0.5, rel_tol=1e-3)


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: FixedKL(alpha=-1.0), "alpha"),
        (lambda: AdaptiveKL(target=0.0), "target"),
        (lambda: AdaptiveKL(target=1.0, rate=0.0), "rate"),
        (lambda: AdaptiveKL(target=1.0, min_alpha=2.0, max_alpha=1.0), "min_alpha"),
        (lambda: AdaptiveKL(target=1.0, alpha=1e9), "alpha"),
    ],
)
def test_an_option_out_of_range_is_refused_with_its_field(build, field):
    with pytest.raises(FieldError, match=f"^{field} must be"):
        build()


def test_seeds_of_a_hundred_thousand_samples_are_distinct_over_runs_epochs_and_indices():
    seeds = torch.cat([sample_seeds(run, epoch, range(1000)) for run in range(10) for epoch in range(10)])
    assert seeds.shape == (100_000,) and seeds.dtype == torch.int64
    assert (seeds >= 0).all()
    assert len(seeds.unique()) == 100_000


def test_seeds_do_not_depend_on_how_samples_are_divided_among_processes():
    whole = sample_seeds(3, 7, range(64))
    parts = torch.cat([sample_seeds(3, 7, range(start, start + 16)) for start in range(0, 64, 16)])
    assert torch.equal(whole, parts)


def test_seeds_look_random_in_every_bit():
    seeds = sample_seeds(0, 0, range(4096))
    bits = torch.stack([(seeds >> bit) & 1 for bit in range(63)]).double()
    assert (bits.mean(1) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(4096)
