"""Weighted denoising score matching is the evidence bound, by quadratures that share nothing with it."""

import pytest
import torch

from ddpo.control.checks.elbo import GAUSSIAN, MIXTURE, changed, check_bound, check_likelihood, exact_score
from ddpo.control.diffusion.elbo import denoising_bound
from ddpo.control.diffusion.time_reversal import VESDE, TimeReversal
from ddpo.control.problems.mixture import gaussian_mixture


@pytest.mark.parametrize("check", [check_bound, check_likelihood])
def test_the_bound_is_entropy_plus_gap_and_bounds_the_likelihood(check):
    found = list(check())
    assert found and [one for one in found if not one.passed] == []


def test_it_is_lowest_at_the_exact_score_and_its_excess_is_quadratic():
    best = exact_score(MIXTURE)
    lowest = denoising_bound(MIXTURE, best)[0]
    excess = [denoising_bound(MIXTURE, changed(best, shift=c))[0] - lowest for c in (0.1, 0.2)]
    assert excess[1] / excess[0] == pytest.approx(4.0, rel=1e-3)
    assert excess[0] == pytest.approx(0.5 * 0.1**2 * 10.05, rel=1e-3)  # half of int beta = .1 + 19.9 / 2


def test_the_variance_exploding_bound_of_gaussian_data_is_its_entropy():
    problem = TimeReversal(data=gaussian_mixture([1.0], [[0.7]], [0.5]), sde=VESDE(sigma_min=0.3, sigma_max=8.0))
    exact = 0.5 * torch.log(torch.tensor(2 * torch.pi * torch.e * 0.25, dtype=torch.float64))
    assert denoising_bound(problem, exact_score(problem))[0] == pytest.approx(float(exact), abs=1e-9)


def test_data_of_more_dimensions_are_refused():
    plane = TimeReversal(data=gaussian_mixture([1.0], [[0.0, 0.0]], [1.0]), sde=GAUSSIAN.sde)
    with pytest.raises(ValueError, match="the data have 2 dimensions"):
        denoising_bound(plane, exact_score(plane))
