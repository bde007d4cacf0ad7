"""The soft value against Gaussian quadrature, finite differences and the linear-quadratic regulator."""

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from ddpo.control.diffusion.chain import quadratic
from ddpo.control.diffusion.soft_value import ExactSoftValue, hjb_residual, soft_value

ALPHAS = [0.5, 1.0, 2.0]


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def plane(alpha, curvature=((1.0, 0.2), (0.2, 0.5))):
    return ExactSoftValue(
        A=double([[-1.0, 0.3], [0.0, -0.5]]),
        offset=double([0.4, -0.6]),
        sigma=double([[1.0, 0.0], [0.4, 0.7]]),
        reward=quadratic(torch.tensor(curvature), torch.tensor([0.3, -0.4]), c=0.7),
        alpha=alpha,
        horizon=1.0,
    )


def estimate(problem, x, **options):
    settings = {"num_steps": 20, "num_paths": 30_000, "generator": torch.Generator().manual_seed(0)} | options
    return soft_value(
        x, problem.drift, problem.sigma, problem.reward, alpha=problem.alpha, horizon=problem.horizon, **settings
    )


@pytest.mark.parametrize("alpha", ALPHAS)
def test_exact_value_is_the_gaussian_integral(alpha):
    a, c, sigma, horizon, x = -0.8, 0.3, 0.9, 1.5, 0.4
    problem = ExactSoftValue(
        A=double([[a]]),
        offset=double([c]),
        sigma=double([[sigma]]),
        reward=quadratic(torch.tensor([[1.2]]), torch.tensor([0.5]), c=-0.2),
        alpha=alpha,
        horizon=horizon,
    )
    mean = math.exp(a * horizon) * x + c * math.expm1(a * horizon) / a
    std = sigma * math.sqrt(math.expm1(2 * a * horizon) / (2 * a))

    def integrand(y):
        return norm.pdf(y, mean, std) * math.exp((-0.6 * y**2 + 0.5 * y - 0.2) / alpha)

    integral = quad(integrand, mean - 12 * std, mean + 12 * std, epsabs=0, epsrel=1e-12)[0]
    assert problem.value(double([[x]]), double(0.0)).item() == pytest.approx(-alpha * math.log(integral), rel=1e-7)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("curvature", [((1.0, 0.2), (0.2, 0.5)), ((0.0, 0.0), (0.0, 0.0))], ids=["quadratic", "linear"])
def test_monte_carlo_value_and_control_are_exact_within_their_standard_errors(alpha, curvature):
    problem, x = plane(alpha, curvature), double([[1.5, 1.0], [0.0, -1.0]])
    result = estimate(problem, x, with_control=True)
    z = (result.value - problem.value(x, double(0.0))) / result.standard_error
    assert z.abs().max() < 4
    missed = (result.control - problem.control(x, double(0.0))).abs()
    assert (missed < 4 * result.control_standard_error + 2e-3).all()
    assert result.reliable.all()


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_estimate_tells_the_inverse_weight_apart(alpha):
    x = double([[1.5, 1.0]])
    result = estimate(plane(alpha), x)
    wrong = plane(1 / alpha).value(x, double(0.0))
    assert ((result.value - wrong) / result.standard_error).abs().max() > 20


def test_standard_error_is_the_spread_of_repeated_estimates():
    problem, x = plane(0.5), double([[1.5, 1.0]]).expand(200, -1)
    result = estimate(problem, x, num_paths=500, num_steps=5)
    assert result.value.std().item() == pytest.approx(result.standard_error.mean().item(), rel=0.2)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_exact_value_solves_the_hjb_equation_and_a_wrong_alpha_does_not(alpha):
    problem = plane(alpha)
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    residual = hjb_residual(problem.value, problem.drift, problem.sigma, alpha=alpha, x=x, t=0.3)
    assert residual.abs().max() < 1e-12
    wrong = hjb_residual(problem.value, problem.drift, problem.sigma, alpha=alpha + 0.1, x=x, t=0.3)
    assert wrong.abs().max() > 1e-3


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_control_achieves_the_value_by_simulation(alpha):
    problem, num_steps = plane(alpha), 100
    generator, dt = torch.Generator().manual_seed(2), 1 / num_steps
    x = double([[1.5, 1.0]]).expand(3000, -1)
    exact, cost = problem.value(x[:1], double(0.0)).item(), torch.zeros(3000).double()
    for k in range(num_steps):
        u = problem.control(x, double(k * dt))
        noise = math.sqrt(dt) * torch.randn(x.shape, dtype=torch.float64, generator=generator)
        cost += alpha * (0.5 * dt * u.square().sum(1) + (u * noise).sum(1))
        x = x + problem.drift(x) * dt + (u * dt + noise) @ problem.sigma.T
    cost -= problem.reward(x)
    assert cost.mean().item() == pytest.approx(exact, abs=0.01 * alpha + 4 * cost.std().item() / math.sqrt(3000))


def test_few_effective_paths_warn_and_are_flagged():
    problem = plane(0.01, ((0.0, 0.0), (0.0, 0.0)))
    with pytest.warns(RuntimeWarning, match="effective sample size"):
        result = estimate(problem, double([[0.0, 0.0]]), num_paths=1000)
    assert not result.reliable.any()


def test_huge_rewards_do_not_overflow():
    problem = plane(0.5)
    result = soft_value(
        double([[0.0, 0.0]]),
        problem.drift,
        problem.sigma,
        lambda x: 1e4 + problem.reward(x),
        alpha=0.5,
        horizon=1.0,
        num_steps=5,
        num_paths=2000,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.isfinite(result.value).all() and result.value.item() == pytest.approx(-1e4, rel=1e-3)


def test_infinite_values_and_bad_weights_are_refused():
    with pytest.raises(ValueError, match="infinite"):
        plane(0.5, ((-9.0, 0.0), (0.0, -9.0))).value(double([[0.0, 0.0]]), double(0.0))
    with pytest.raises(ValueError, match="alpha"):
        estimate(plane(-1.0), double([[0.0, 0.0]]))
