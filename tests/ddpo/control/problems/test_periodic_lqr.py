"""The regulator with periodic coefficients, against routes that share no equation with its solver."""

import numpy as np
import pytest
import torch

from ddpo.control.checks.periodic_lqr import CHECKS, example
from ddpo.control.problems.periodic_lqr import PeriodicLQR


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_the_check_passes(check):
    found = list(check.run())
    assert found and [one for one in found if not one.passed] == []


def test_the_solution_repeats_and_changes_within_a_period():
    problem, x = example(), torch.tensor([[0.3, -1.0]], dtype=torch.float64)
    assert float(problem.value(0.2, x)) == pytest.approx(float(problem.value(7.2, x)), rel=1e-9)
    assert np.allclose(problem.gain(0.2), problem.gain(3.2), rtol=1e-9)
    assert abs(problem.gain(0.2) / problem.gain(0.7) - 1).max() > 0.3


def test_no_other_gain_earns_more():
    """Half a period later, or the mean gain: the HJB's right-hand side falls short by |a - a*|^2_R / 2."""
    problem, t = example(), 0.35
    x = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    best = problem.optimal_action(t, x)
    gradient = -x @ torch.from_numpy(problem.coefficients(t)[0])

    def earned(a):
        return problem.reward(x, a, t) + (gradient * problem.drift(x, a, t)).sum(1)

    for other in (problem.optimal_action(t + 0.5, x), torch.zeros_like(best)):
        lost = earned(best) - earned(other)
        weight = 0.4 + 0.2 * np.cos(4 * np.pi * t)
        assert torch.allclose(lost, 0.5 * weight * (best - other).square().sum(1), rtol=1e-8, atol=1e-12)


def test_a_state_that_no_action_holds_is_refused():
    with pytest.raises(ValueError, match="the cost P does not settle over periods of 1"):
        PeriodicLQR(lambda t: [[0.6 + 0.1 * np.sin(2 * np.pi * t)]], [[0.0]], [[1.0]], [[1.0]], [[0.1]],
                    period=1.0, discount=0.5)  # fmt: skip


@pytest.mark.parametrize(("period", "discount"), [(0.0, 0.1), (1.0, 0.0)])
def test_numbers_out_of_range_are_refused(period, discount):
    with pytest.raises(ValueError, match="needs period > 0 and discount > 0"):
        PeriodicLQR(-1.0, 1.0, 1.0, 1.0, 1.0, period=period, discount=discount)
