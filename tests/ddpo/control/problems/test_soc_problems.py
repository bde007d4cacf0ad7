"""Problems of the literature against Riccati integration, closed forms and Monte Carlo."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from ddpo.control.diffusion.soft_value import soft_value
from ddpo.control.problems.soc_problems import (
    QuadraticOU,
    control_error,
    double_well,
    linear_ou,
    quadratic_ou_easy,
    quadratic_ou_hard,
)
from ddpo.control.solvers.adjoint_matching import (
    AffineControl,
    SeparableControl,
    adjoint_matching,
    adjoint_regression,
    lean_adjoints,
    sample_paths,
)
from ddpo.control.solvers.deep_bsde import DeepBSDEProblem, control_cost, exact_value, monte_carlo_value


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


class Network(torch.nn.Module):
    def __init__(self, dim, width, generator):
        super().__init__()
        self.hidden = torch.nn.Linear(dim + 1, width, dtype=torch.float64)
        self.out = torch.nn.Linear(width, dim, dtype=torch.float64)
        torch.nn.init.normal_(self.hidden.weight, generator=generator)
        torch.nn.init.zeros_(self.out.weight)

    def forward(self, x, t):
        return self.out(torch.tanh(self.hidden(torch.cat([x, t.expand(len(x))[:, None]], 1))))


def test_riccati_matrix_is_the_integrated_equation():
    d = 3
    A, P, Q, sigma = (torch.randn(d, d, dtype=torch.float64, generator=seeded(i)) for i in range(4))
    P, Q = P @ P.T, Q @ Q.T
    problem = QuadraticOU(A=A, P=P, Q=Q, sigma=sigma, start=torch.zeros(d).double())
    a, p, noise = A.numpy(), P.numpy(), (sigma @ sigma.T).numpy()

    def backward(_s, flat):
        F = flat.reshape(d, d)
        return (a.T @ F + F @ a - 2 * F @ noise @ F + p).ravel()

    solution = solve_ivp(backward, (0, 0.7), Q.numpy().ravel(), method="DOP853", rtol=1e-12, atol=1e-12)
    assert np.allclose(problem.riccati(scalar(0.3)).numpy().ravel(), solution.y[:, -1], rtol=1e-8)


@pytest.mark.parametrize(("make", "a", "p", "q"), [(quadratic_ou_easy, 0.2, 0.2, 0.1), (quadratic_ou_hard, 1, 1, 0.5)])
def test_isotropic_problems_have_the_scalar_solution(make, a, p, q):
    def slope(_s, F):
        return 2 * a * F - 2 * F**2 + p

    gain = solve_ivp(slope, (0, 0.6), [q], rtol=1e-12, atol=1e-12).y[0, -1]
    x = torch.randn(4, 20, dtype=torch.float64, generator=seeded())
    assert torch.allclose(make(seeded()).optimal_control(x, scalar(0.4)), -2 * gain * x, rtol=1e-8)


def test_linear_problem_has_the_gradient_of_its_soft_value():
    problem = linear_ou(seeded(), dim=4)
    x = torch.zeros(1, 4, dtype=torch.float64)
    result = soft_value(
        x,
        lambda y, t: problem.drift(y),
        problem.sigma,
        lambda y: -problem.terminal_cost(y),
        alpha=1.0,
        horizon=1.0,
        num_steps=200,
        num_paths=200,
        generator=seeded(1),
        with_control=True,
        min_effective_sample_size=1.0,
    )
    assert torch.allclose(result.control, problem.optimal_control(x, scalar(0.0)), rtol=1e-4)


@pytest.mark.parametrize("coordinate", [0, 9], ids=["steep", "flat"])
def test_double_well_control_is_the_gradient_of_its_soft_value(coordinate):
    problem, start = double_well(), 0.9
    x = torch.full((1, 10), 0.6, dtype=torch.float64)
    kappa, nu = problem.kappa[coordinate], problem.nu[coordinate]
    result = soft_value(
        x[:, :1],
        lambda y, t: -4 * kappa * y * (y**2 - 1),
        torch.eye(1, dtype=torch.float64),
        lambda y: -nu * (y[:, 0] ** 2 - 1) ** 2,
        alpha=1.0,
        horizon=1.0,
        start=start,
        num_steps=20,
        num_paths=20_000,
        generator=seeded(2),
        with_control=True,
    )
    exact = problem.optimal_control(x, scalar(start))[0, coordinate].item()
    assert result.control.item() == pytest.approx(exact, abs=4 * result.control_standard_error.item() + 5e-3)
    assert abs(exact) > 0.1


def test_optimal_control_has_no_error_and_no_control_all_of_it():
    problem = double_well()
    settings = {"num_paths": 5, "num_steps": 100}
    assert control_error(problem, problem.optimal_control, generator=seeded(), **settings).squared == 0
    none = control_error(problem, lambda x, t: torch.zeros_like(x), generator=seeded(), **settings)
    assert none.relative == pytest.approx(1)


@pytest.mark.parametrize(("make", "bar"), [(quadratic_ou_easy, 2e-3), (quadratic_ou_hard, 1e-2), (linear_ou, 2e-4)])
def test_adjoint_matching_reaches_the_optimal_control(make, bar):
    problem = make(seeded())
    control = AffineControl(problem.start.shape[0])
    adjoint_regression(problem, control, generator=seeded(1), num_paths=128)
    assert control_error(problem, control, num_paths=100, generator=seeded(2)).relative < bar


def test_gradient_descent_on_a_network_reduces_the_control_error():
    problem, control = quadratic_ou_hard(seeded(), dim=2), Network(2, 32, seeded(1))
    adjoint_matching(problem, control, generator=seeded(2), num_iterations=120, num_paths=64, num_steps=20)
    assert control_error(problem, control, num_paths=200, generator=seeded(3)).relative < 0.06


def test_separable_control_learns_the_double_well():
    problem, control = double_well(dim=2, num_steep=0), SeparableControl(2)
    adjoint_regression(problem, control, generator=seeded(1), num_iterations=16, num_paths=256, num_steps=50)
    assert control_error(problem, control, num_paths=100, generator=seeded(2), num_steps=50).relative < 0.15


def test_control_variate_keeps_the_mean_and_removes_the_noise_at_the_optimum():
    problem = quadratic_ou_easy(seeded(), dim=3)
    paths = sample_paths(problem, problem.optimal_control, num_paths=4000, num_steps=50, generator=seeded(1))

    def gain(x, t):
        return (
            -2
            * torch.stack([problem.riccati(s) for s in t[:: len(paths.noise[0])]]).repeat_interleave(
                len(paths.noise[0]), 0
            )
            @ x[..., None]
        )

    def batched(x, t):
        return gain(x, t)[..., 0]

    plain = lean_adjoints(problem, batched, paths, control_variate=False)[0]
    reduced = lean_adjoints(problem, batched, paths)[0]
    best = problem.optimal_control(paths.states[0, :1], paths.times[0])
    spread = plain.std(0) / math.sqrt(4000)
    assert ((plain.mean(0) + best[0]) / spread).abs().max() < 4
    assert (reduced + best).abs().max() < 0.02
    assert reduced.std(0).max() < 0.05 * plain.std(0).min()


def test_deep_bsde_value_is_reproduced_by_quadrature_and_simulation():
    assert exact_value() == pytest.approx(4.590161724604863, rel=1e-10)
    result = monte_carlo_value(num_paths=20_000, generator=seeded())
    assert abs(result.value.item() - exact_value()) < 4 * result.standard_error.item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0])
def test_deep_bsde_quadrature_is_simulation_at_other_temperatures(temperature):
    result = monte_carlo_value(num_paths=50_000, dim=5, temperature=temperature, generator=seeded(1))
    assert abs(result.value.item() - exact_value(dim=5, temperature=temperature)) < 4 * result.standard_error.item()


def test_deep_bsde_optimal_control_costs_the_value():
    problem = DeepBSDEProblem()
    cost, error = control_cost(problem, problem.optimal_control, num_paths=500, generator=seeded(), num_steps=40)
    assert cost == pytest.approx(exact_value(), abs=4 * error + 1e-3)
    assert error < 0.01
