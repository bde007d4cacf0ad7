import numpy as np
import pytest
import torch
from scipy.linalg import eigh_tridiagonal

from ddpo.control.problems.double_well import DoubleWell, solve_double_well

STATES = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]


def log_phi_of_a_reversible_chain(problem, t, num_states=1601, half_width=2.5):
    """log phi at STATES from a birth-death chain in detailed balance with exp(-2 U / sigma^2), by its eigenvectors.

    Scharfetter and Gummel's rates, reflecting ends and exact time: nothing in common with Crank-Nicolson on the
    backward equation. Also of second order in the spacing.
    """
    grid = np.linspace(-half_width, half_width, num_states)
    spacing = grid[1] - grid[0]
    potential = 2 * problem.barrier * (grid**2 - 1) ** 2 / problem.noise**2
    rise = np.diff(potential)
    up = problem.noise**2 / (2 * spacing**2) * rise / np.expm1(rise)
    down = problem.noise**2 / (2 * spacing**2) * -rise / np.expm1(-rise)
    diagonal = -np.append(up, 0) - np.append(0, down)
    modes, vectors = eigh_tridiagonal(diagonal, np.sqrt(up * down))
    half_density = np.exp(-0.5 * (potential - potential.min()))
    terminal = np.exp(problem.terminal_reward(torch.from_numpy(grid)[:, None]).numpy() / problem.temperature)
    phi = vectors @ (np.exp(modes * (problem.horizon - t)) * (vectors.T @ (half_density * terminal))) / half_density
    inside = np.abs(grid) < STATES.max().item() + 0.05
    grid, log_phi = grid[inside], np.log(phi[inside])
    wanted = STATES[:, 0].numpy()
    return np.interp(wanted, grid, log_phi), np.interp(wanted, grid, np.gradient(log_phi, grid))


@pytest.mark.parametrize(
    "problem",
    [
        DoubleWell(temperature=0.3),
        DoubleWell(lambda x: -torch.cos(2 * x[:, 0]), barrier=1.5, noise=0.8, temperature=2.0, horizon=0.5),
    ],
    ids=["right", "cosine"],
)
def test_value_and_control_agree_with_a_reversible_chain(problem):
    reference = solve_double_well(problem)
    for t in (0.0, 0.5 * problem.horizon):
        log_phi, slope = log_phi_of_a_reversible_chain(problem, t)
        assert np.abs(reference.value(t, STATES).numpy() - problem.temperature * log_phi).max() < 2e-4
        assert np.abs(reference.optimal_action(t, STATES)[:, 0].numpy() - problem.noise * slope).max() < 2e-3
        assert np.abs(reference.value(t, STATES).numpy() - log_phi / problem.temperature).max() > 1e-2


def test_error_falls_with_the_square_of_the_step():
    problem = DoubleWell()
    finest = solve_double_well(problem, num_intervals=2400, num_steps=1600)
    errors = np.array(
        [
            [
                (coarse.value(0.0, STATES) - finest.value(0.0, STATES)).abs().max().item(),
                (coarse.optimal_action(0.0, STATES) - finest.optimal_action(0.0, STATES)).abs().max().item(),
            ]
            for coarse in (solve_double_well(problem, num_intervals=6 * k, num_steps=4 * k) for k in (12, 25, 50))
        ]
    )
    orders = np.log2(errors[:-1] / errors[1:])
    assert (np.abs(orders - 2) < 0.15).all(), orders


def test_the_default_grid_is_converged_in_both_steps_and_in_width():
    problem = DoubleWell()
    default = solve_double_well(problem)
    for other in (
        solve_double_well(problem, num_intervals=2400, num_steps=1600),
        solve_double_well(problem, num_intervals=1600, half_width=4.0),
    ):
        assert (default.value(0.2, STATES) - other.value(0.2, STATES)).abs().max() < 3e-5


def simulated(problem, control, x0, num_paths=20_000, num_steps=250):
    """Euler paths' rewards (num_paths,) with control(t, x)."""
    rng = torch.Generator().manual_seed(0)
    dt = problem.horizon / num_steps
    x, total = torch.full((num_paths, 1), x0, dtype=torch.float64), torch.zeros(num_paths, dtype=torch.float64)
    for step in range(num_steps):
        u = control(step * dt, x)
        noise = torch.randn(num_paths, 1, dtype=torch.float64, generator=rng)
        total = total + problem.reward(x, u) * dt
        x = x + problem.drift(x, u) * dt + problem.noise * dt**0.5 * noise
    return total + problem.terminal_reward(x)


@pytest.mark.parametrize("x0", [-1.0, 0.3])
def test_value_is_the_feynman_kac_mean_over_free_paths(x0):
    problem = DoubleWell()
    weights = (simulated(problem, lambda t, x: torch.zeros_like(x), x0) / problem.temperature).exp()
    error = problem.temperature * (weights.std() / weights.mean()).item() / len(weights) ** 0.5
    exact = solve_double_well(problem).value(0.0, torch.tensor([[x0]], dtype=torch.float64)).item()
    bias = 5e-3
    assert abs(problem.temperature * weights.mean().log().item() - exact) < 4 * error + bias
    no_temperature = simulated(problem, lambda t, x: torch.zeros_like(x), x0).exp().mean().log().item()
    assert abs(no_temperature - exact) > 4 * error + bias


def test_optimal_control_attains_the_value_and_others_do_not():
    problem = DoubleWell()
    reference = solve_double_well(problem, num_intervals=400, num_steps=200, half_width=4.0)
    exact = reference.value(0.0, torch.tensor([[-1.0]], dtype=torch.float64)).item()
    for scale, loss in ((1.0, 0.0), (0.5, 0.04), (1.5, 0.04)):
        rewards = simulated(
            problem, lambda t, x, scale=scale: scale * reference.optimal_action(t, x), -1.0, num_paths=5000
        )
        if loss:
            assert rewards.mean().item() < exact - loss
        else:
            assert rewards.mean().item() == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("name", ["barrier", "noise", "temperature", "horizon"])
def test_parameters_that_are_not_positive_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        DoubleWell(**{name: 0.0})


def test_grids_too_small_and_states_outside_are_refused():
    problem = DoubleWell()
    with pytest.raises(ValueError, match="num_steps >= 4"):
        solve_double_well(problem, num_steps=2)
    with pytest.raises(ValueError, match="larger half_width"):
        solve_double_well(problem, num_intervals=60, num_steps=40).value(0.0, torch.tensor([[3.5]]))
    with pytest.raises(ValueError, match="larger half_width"):
        solve_double_well(problem, num_intervals=60, num_steps=40).value(0.0, torch.tensor([[float("nan")]]))


def test_a_grid_on_which_phi_loses_its_sign_is_refused():
    with pytest.raises(ValueError, match="raise num_intervals"):
        solve_double_well(DoubleWell(barrier=20.0, noise=0.3, temperature=0.01), num_intervals=24, num_steps=4)
