"""Time reversal against autograd, quadrature and the HJB equation."""

import pytest
import torch
from scipy.integrate import quad

from ddpo.control.diffusion.time_reversal import (
    VESDE,
    VPSDE,
    TimeReversal,
    perturbed_controls,
    verify,
)
from ddpo.control.problems.mixture import gaussian_mixture

LINE = gaussian_mixture([0.3, 0.7], [[-1.5], [1.0]], [0.4, 0.6])
PLANE = gaussian_mixture([0.3, 0.7], [[-1.5, 0.5], [1.0, -0.5]], [0.4, 0.6])
SDES = [VPSDE(), VESDE(sigma_min=0.05, sigma_max=8.0)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("sde", SDES, ids=["VP", "VE"])
@pytest.mark.parametrize("t", [0.1, 0.5, 1.0])
def test_marginal_coefficients_are_the_integrals_of_the_sde(sde, t):
    scale = torch.exp(scalar(quad(lambda s: sde.rate(scalar(s)).item(), 0, t)[0]))
    assert sde.scale(scalar(t)).item() == pytest.approx(scale.item(), rel=1e-9)

    def transported(s):
        return ((sde.scale(scalar(t)) / sde.scale(scalar(s))) * sde.diffusion(scalar(s))).item() ** 2

    assert sde.std(scalar(t)).item() ** 2 == pytest.approx(quad(transported, 0, t)[0], rel=1e-9)


def hjb_terms(problem, x, t):
    """dV/dt, |u*|^2 / 2, drift . grad V with u*, and the second-order term."""
    value = problem.value(x, t)
    slope_t = torch.stack([torch.autograd.grad(v, t, retain_graph=True)[0] for v in value])
    slope = torch.autograd.grad(value.sum(), x, create_graph=True)[0]
    rows = [torch.autograd.grad(slope[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(x.shape[1])]
    sigma, u = problem.diffusion(t), problem.optimal_control(x, t)
    assert torch.allclose(u, -sigma * slope, rtol=1e-9)
    advected = ((problem.drift(x, t) + sigma * u) * slope).sum(1)
    return slope_t + 0.5 * u.square().sum(1) + advected + 0.5 * sigma**2 * sum(rows)


@pytest.mark.parametrize("sde", SDES, ids=["VP", "VE"])
@pytest.mark.parametrize("data", [LINE, PLANE], ids=["1-D", "2-D"])
def test_minus_log_density_solves_the_hjb_equation_and_its_gradient_is_the_control(sde, data):
    problem = TimeReversal(data=data, sde=sde)
    x = torch.randn(6, data.dim, dtype=torch.float64, generator=seeded()).requires_grad_()
    t = scalar(0.7).requires_grad_()
    assert (hjb_terms(problem, x, t) - problem.divergence(t)).abs().max() < 1e-9


def test_hjb_equation_tells_the_sign_of_the_divergence():
    problem, t = TimeReversal(data=PLANE, sde=VPSDE()), scalar(0.7).requires_grad_()
    x = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    assert (hjb_terms(problem, x, t) + problem.divergence(t)).abs().max() > 1


@pytest.mark.parametrize("sde", SDES, ids=["VP", "VE"])
@pytest.mark.parametrize("data", [LINE, PLANE], ids=["1-D", "2-D"])
def test_cost_is_the_value_plus_half_the_squared_distance_from_the_optimum(sde, data):
    problem = TimeReversal(data=data, sde=sde)
    for control in perturbed_controls(problem).values():
        result = verify(problem, control, num_steps=100, num_paths=3000, generator=seeded(0), scheme="heun")
        assert abs(result.bias) < 0.03 + 4 * result.bias_standard_error
        assert abs(result.difference) < 0.03 + 4 * result.standard_error


def test_identity_tells_a_missing_half_apart():
    problem = TimeReversal(data=LINE, sde=VPSDE())
    control = perturbed_controls(problem)["u* + sin(2 x + 3 t)"]
    result = verify(problem, control, num_steps=100, num_paths=4000, generator=seeded(), scheme="heun")
    assert abs(result.bias - result.gap) > 0.03 + 4 * result.bias_standard_error


def test_euler_bias_halves_and_heun_bias_nearly_vanishes():
    problem = TimeReversal(data=LINE, sde=VPSDE())
    coarse, fine = (
        verify(problem, problem.optimal_control, num_steps=n, num_paths=6000, generator=seeded(1)).bias
        for n in (50, 100)
    )
    assert coarse / fine == pytest.approx(2, abs=0.5)
    heun = verify(problem, problem.optimal_control, num_steps=100, num_paths=6000, generator=seeded(1), scheme="heun")
    assert abs(heun.bias) < 0.25 * abs(fine)


def test_monte_carlo_error_falls_as_the_root_of_the_paths():
    problem = TimeReversal(data=LINE, sde=VPSDE())
    few, many = (
        verify(problem, problem.optimal_control, num_steps=20, num_paths=paths, generator=seeded(0)).standard_error
        for paths in (500, 8000)
    )
    assert few / many == pytest.approx(4, rel=0.25)


def test_optimal_control_generates_the_data_and_no_control_does_not():
    problem = TimeReversal(data=LINE, sde=VPSDE(beta_max=10.0))
    end = verify(
        problem, problem.optimal_control, num_steps=100, num_paths=4000, generator=seeded(2), scheme="heun"
    ).terminal
    assert (end < 0).double().mean().item() == pytest.approx(LINE.cdf(torch.zeros(1).double()).item(), abs=0.03)
    assert end.mean().item() == pytest.approx(LINE.mean().item(), abs=0.08)
    free = verify(problem, lambda x, t: torch.zeros_like(x), num_steps=100, num_paths=500, generator=seeded(2)).terminal
    assert free.std() > 3


@pytest.mark.parametrize(
    "wrong", [lambda: VPSDE(beta_min=0.0), lambda: VPSDE(beta_max=0.01), lambda: VESDE(sigma_min=2.0, sigma_max=1.0)]
)
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(ValueError, match="give 0 <"):
        wrong()
