import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import minimize

from ddpo.control.problems.merton import Merton

BOLD, LOGARITHMIC = {"risk_aversion": 0.5}, {"risk_aversion": 1.0}


def right_hand_side(problem, x, a):
    gradient = torch.func.vmap(torch.func.grad(lambda y: problem.value(y[None])[0]))(x)
    curvature = torch.func.vmap(torch.func.hessian(lambda y: problem.value(y[None])[0]))(x)
    sigma = problem.diffusion(x, a)
    return (
        problem.reward(x, a)
        + (gradient * problem.drift(x, a)).sum(-1)
        + 0.5 * (sigma @ sigma.mT * curvature).sum((-2, -1))
    )


def test_solution_is_the_printed_one():
    solution = Merton().solution()
    assert solution.risky_share == pytest.approx(0.625, abs=1e-14)
    assert solution.consumption_rate == pytest.approx(0.0478125, abs=1e-16)
    assert solution.growth == pytest.approx(0.045625, abs=1e-16)
    assert solution.scale == pytest.approx(437.438591994532, abs=1e-10)


@pytest.mark.parametrize("options", [{}, BOLD, LOGARITHMIC, {"risk_aversion": 5.0, "mean_return": 0.01}])
def test_value_solves_the_hjb_equation_with_the_optimal_action_as_maximiser(options):
    problem = Merton(**options)
    x = torch.tensor([0.2, 1.0, 3.7], dtype=torch.float64)[:, None]
    best = problem.optimal_action(x)
    attained = right_hand_side(problem, x, best)
    assert ((attained / (problem.discount * problem.value(x))) - 1).abs().max() < 1e-12
    for move in ((0.05, 0.0), (-0.05, 0.0), (0.0, 0.002), (0.0, -0.002)):
        assert (right_hand_side(problem, x, best + torch.tensor(move, dtype=torch.float64)) < attained).all()


@pytest.mark.parametrize("options", [{}, BOLD, LOGARITHMIC])
def test_best_constant_controls_are_the_optimal_ones(options):
    problem = Merton(**options)

    def loss(controls):
        return -problem.policy_value(controls[0], np.exp(controls[1]))

    start = np.array([0.8, 1.1]) * [problem.solution().risky_share, np.log(problem.solution().consumption_rate)]
    found = minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13})
    assert found.x[0] == pytest.approx(problem.solution().risky_share, rel=1e-5)
    assert np.exp(found.x[1]) == pytest.approx(problem.solution().consumption_rate, rel=1e-5)
    assert -found.fun == pytest.approx(float(problem.value(torch.ones(1, 1).double())), rel=1e-10)


@pytest.mark.parametrize(("options", "share", "rate"), [({}, 0.9, 0.06), (BOLD, 1.5, 0.05)])
def test_policy_value_is_the_mean_utility_of_exact_wealth_paths(options, share, rate):
    # An integral discounted at rate rho is 1/rho times the mean at an exponential time of rate rho.
    problem = Merton(**options)
    rng = np.random.default_rng(0)
    times = rng.exponential(1 / problem.discount, 400_000)
    volatility = share * problem.volatility
    growth = problem.risk_free + share * (problem.mean_return - problem.risk_free) - rate - volatility**2 / 2
    power = 1 - problem.risk_aversion
    wealth = np.exp(growth * times + volatility * np.sqrt(times) * rng.normal(size=times.shape))
    utility = (rate * wealth) ** power / power / problem.discount
    exact = problem.policy_value(share, rate)
    error = utility.std() / np.sqrt(len(times))
    assert abs(utility.mean() - exact) < 4 * error
    assert error < 0.01 * abs(exact)
    without_risk = rate**power / (problem.discount - power * (growth + volatility**2 / 2)) / power
    assert abs(without_risk - exact) > 8 * error


@pytest.mark.parametrize(("share", "percent"), [(1.1 * 0.625, 0.33), (0.625 + 0.1, 0.84)])
def test_an_error_of_the_risky_share_costs_little_of_the_value(share, percent):
    problem = Merton()
    best = -problem.solution().scale
    assert 100 * (problem.policy_value(share, 0.0478125) / best - 1) == pytest.approx(percent, abs=0.005)


def test_logarithmic_utility_is_the_limit_of_power_utility():
    """(c^p - 1) / p tends to log c, so the values' difference over p does too, and the controls are continuous."""
    problem, gamma = Merton(risk_aversion=1.0), 1.0 + 1e-6
    near = Merton(risk_aversion=gamma)
    assert problem.solution().risky_share == pytest.approx(near.solution().risky_share, rel=1e-5)
    assert problem.solution().consumption_rate == 0.05 == pytest.approx(near.solution().consumption_rate, rel=1e-5)
    x = torch.tensor([[0.3], [1.0], [4.0]], dtype=torch.float64)
    shifted = near.value(x) - 1 / ((1 - gamma) * near.discount)  # the constant -1/p of the utility, forever
    assert shifted.numpy() == pytest.approx(problem.value(x).numpy(), abs=1e-2)


def test_the_value_of_constant_controls_at_logarithmic_utility_is_its_integral():
    problem, share, rate = Merton(risk_aversion=1.0), 0.9, 0.06
    drift = 0.03 + share * 0.05 - rate - 0.5 * (share * 0.2) ** 2
    exact = quad(lambda t: np.exp(-0.05 * t) * (np.log(rate) + drift * t), 0, np.inf)[0]
    assert problem.policy_value(share, rate) == pytest.approx(exact, rel=1e-9)


def test_infinite_lifetime_utility_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"rho = 0\.04, \(1 - gamma\) M = 0\.04625"):
        Merton(risk_aversion=0.5, discount=0.04)
    Merton(risk_aversion=0.5, discount=0.047)


def test_a_policy_of_infinite_value_is_refused():
    problem = Merton()
    with pytest.raises(ValueError, match="no finite value"):
        problem.policy_value(0.625, 0.2)
    with pytest.raises(ValueError, match="consumption_rate must be positive"):
        problem.policy_value(0.625, 0.0)


@pytest.mark.parametrize(
    "options", [{"volatility": 0.0}, {"risk_aversion": 0.0}, {"risk_aversion": -2.0}, {"discount": 0.0}]
)
def test_parameters_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Merton(**options)


@pytest.mark.parametrize("aversion", [0.5, 1.0, 2.0])
def test_no_consumption_is_worth_minus_infinity_and_has_no_nan_gradient(aversion):
    problem = Merton(risk_aversion=aversion)
    action = torch.tensor([[0.5, -0.1], [0.5, 0.0], [0.5, 0.1]], requires_grad=True)
    reward = problem.reward(torch.ones(3, 1), action)
    assert reward[:2].tolist() == [-np.inf, -np.inf]
    assert torch.isfinite(reward[2])
    reward[2].backward()
    assert torch.isfinite(action.grad).all()
    assert action.grad[2, 1] == pytest.approx(0.1**-aversion, rel=1e-5)


def test_methods_have_the_shapes_and_dtype_of_the_states():
    problem = Merton()
    x, a = torch.ones(7, 1), torch.full((7, 2), 0.1)
    assert problem.drift(x, a).shape == (7, 1)
    assert problem.diffusion(x, a).shape == (7, 1, 1)
    assert problem.reward(x, a).shape == problem.value(x).shape == (7,)
    assert problem.optimal_action(x).shape == (7, 2)
    assert problem.value(x).dtype == problem.optimal_action(x).dtype == torch.float32
