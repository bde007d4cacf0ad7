"""Path KL against closed forms."""

import math

import pytest
import torch

from ddpo.control.diffusion.girsanov import affine_path_kl, path_kl


def double(values):
    return torch.tensor(values, dtype=torch.float64)


A, SIGMA = double([[-1.0, 0.3], [0.0, -0.5]]), double([[1.0, 0.0], [0.4, 0.7]])
GAIN, SHIFT, START = double([[0.5, -0.2], [0.1, 0.3]]), double([0.4, -0.6]), double([1.0, 1.0])


def estimate(gain, shift, *, num_paths=20_000, num_steps=100, horizon=1.0):
    return path_kl(
        lambda x, t: x @ gain.T + shift,
        lambda x, t: x @ A.T,
        SIGMA,
        START.expand(num_paths, -1),
        horizon=horizon,
        num_steps=num_steps,
        generator=torch.Generator().manual_seed(0),
    )


def exact(gain, shift, horizon=1.0):
    return affine_path_kl(A, SIGMA, gain, shift, mean=START, cov=torch.zeros(2, 2).double(), horizon=horizon)


def test_constant_control_costs_half_its_square_per_unit_of_time():
    result = estimate(0 * GAIN, SHIFT, num_paths=10, horizon=2.0)
    assert result.integral == pytest.approx(0.5 * 2 * (0.16 + 0.36), rel=1e-12)
    assert exact(0 * GAIN, SHIFT, 2.0) == pytest.approx(0.52, rel=1e-10)


def test_linear_control_of_a_scalar_process_matches_its_closed_form():
    a, k, horizon = -1.0, 0.4, 1.5
    rate = 2 * (a + k)
    second_moment = (1.0 + 1 / rate) * (math.expm1(rate * horizon) / rate) - horizon / rate
    value = affine_path_kl(
        double([[a]]),
        double([[1.0]]),
        double([[k]]),
        double([0.0]),
        mean=double([1.0]),
        cov=double([[0.0]]),
        horizon=horizon,
    )
    assert value == pytest.approx(0.5 * k**2 * second_moment, rel=1e-9)


def test_affine_control_matches_the_moment_equations_three_ways():
    result, value = estimate(GAIN, SHIFT), exact(GAIN, SHIFT)
    bias = 0.01 * value
    assert abs(result.integral - value) < 4 * result.standard_error + bias
    assert abs(result.log_ratio - value) < 4 * result.log_ratio_standard_error + bias
    assert abs(result.integral / 0.5 - value) > 100 * result.standard_error + bias


def test_sum_of_step_divergences_is_that_of_torch_distributions():
    x, dt = START[None], 0.01
    u = x @ GAIN.T + SHIFT
    cov = SIGMA @ SIGMA.T * dt
    law = torch.distributions.MultivariateNormal
    step = torch.distributions.kl_divergence(law(x + (x @ A.T + u @ SIGMA.T) * dt, cov), law(x + x @ A.T * dt, cov))
    result = estimate(GAIN, SHIFT, num_paths=3, num_steps=1, horizon=dt)
    assert result.step_sum == pytest.approx(step.item(), rel=1e-10)


def test_step_sum_equals_the_integral_to_rounding():
    result = estimate(GAIN, SHIFT, num_paths=100)
    assert result.step_sum == pytest.approx(result.integral, rel=1e-10)
