import numpy as np
import pytest
import torch
from scipy.linalg import expm

from ddpo.control.problems.linear_gaussian import LinearGaussian
from ddpo.control.problems.lqr import StochasticLQR

HORIZON = 1.3


def constant_matrices(seed=0, n=3, m=2, w=2):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(n, n))
    return rng.normal(size=(n, n)), rng.normal(size=(n, m)), q @ q.T, np.eye(m) * 0.7, rng.normal(size=(n, w))


def moving_problem(discount):
    """Everything that may depend on time does."""
    a, b, q, r, d = constant_matrices()
    return LinearGaussian(
        lambda t: a * (1 + 0.5 * np.sin(3 * t)),
        lambda t: b * np.exp(-t),
        lambda t: q * (1 + t),
        lambda t: r * (1 + t**2),
        lambda t: d * np.cos(t),
        horizon=HORIZON,
        offset=lambda t: np.array([t, -1.0, 0.5]),
        terminal_cost=np.diag([1.0, 0.0, 2.0]),
        terminal_slope=[0.3, -1.0, 0.0],
        discount=discount,
    )


def hjb_residual(problem, t, x, a, step=1e-4):
    """Residual rho V - (r + dV/dt + L^a V); autograd in x, central differences in t."""

    def value(y):
        return problem.value(t, y[None])[0]

    gradient, hessian = torch.func.vmap(torch.func.grad(value))(x), torch.func.vmap(torch.func.hessian(value))(x)
    slope = (problem.value(t + step, x) - problem.value(t - step, x)) / (2 * step)
    sigma = problem.diffusion(x, a, t)
    trace = (sigma @ sigma.mT * hessian).sum((-2, -1))
    gain = problem.reward(x, a, t) + slope + (gradient * problem.drift(x, a, t)).sum(-1) + 0.5 * trace
    return problem.discount * problem.value(t, x) - gain


@pytest.mark.parametrize("discount", [0.0, 0.3])
def test_quadratic_term_is_that_of_the_hamiltonian_matrix_exponential(discount):
    a, b, q, r, d = constant_matrices()
    terminal = np.diag([1.0, 0.0, 2.0])
    problem = LinearGaussian(a, b, q, r, d, horizon=HORIZON, terminal_cost=terminal, discount=discount)
    shifted = a - discount / 2 * np.eye(3)
    hamiltonian = np.block([[shifted, -b @ np.linalg.solve(r, b.T)], [-q, -shifted.T]])
    for t in (0.0, 0.4, 1.2):
        flow = expm(-hamiltonian * (HORIZON - t)) @ np.vstack([np.eye(3), terminal])
        expected = flow[3:] @ np.linalg.inv(flow[:3])
        np.testing.assert_allclose(problem.coefficients(t)[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("discount", [0.0, 0.3])
def test_value_solves_the_hjb_equation_and_the_optimal_action_is_its_maximiser(discount):
    problem = moving_problem(discount)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, dtype=torch.float64, generator=rng)
    for t in (0.05, 0.6, 1.25):
        best = problem.optimal_action(t, x)
        assert hjb_residual(problem, t, x, best).abs().max() < 1e-5
        step = 0.1 * torch.randn(best.shape, dtype=torch.float64, generator=rng)
        loss = 0.5 * 0.7 * (1 + t**2) * step.square().sum(-1)
        assert (hjb_residual(problem, t, x, best + step) - loss).abs().max() < 1e-5
        assert loss.max() > 1e-3


def test_value_ends_in_the_terminal_reward():
    problem = moving_problem(0.3)
    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert (problem.value(HORIZON, x) - problem.terminal_reward(x)).abs().max() < 1e-13


def test_kl_controlled_value_is_the_soft_value_of_exactly_sampled_paths():
    # B = D and R = alpha: V = alpha log E exp(g(X_T) / alpha) over free Ornstein-Uhlenbeck paths, whose law is known.
    rate, noise, alpha, x0 = 0.8, 0.6, 0.4, 0.5
    problem = LinearGaussian(
        -rate, noise, 0.0, alpha, noise, horizon=HORIZON, offset=0.2, terminal_cost=1.5, terminal_slope=0.7
    )
    decay = np.exp(-rate * HORIZON)
    std = noise * np.sqrt((1 - decay**2) / (2 * rate))
    ends = x0 * decay + 0.2 * (1 - decay) / rate + std * np.random.default_rng(0).normal(size=400_000)
    weights = np.exp((-0.75 * ends**2 + 0.7 * ends) / alpha)
    error = alpha * weights.std() / weights.mean() / np.sqrt(len(ends))
    exact = problem.value(0.0, torch.tensor([[x0]], dtype=torch.float64)).item()
    assert abs(alpha * np.log(weights.mean()) - exact) < 4 * error
    assert error < 1e-3
    assert abs(np.log(weights.mean()) / alpha - exact) > 100 * error


def test_optimal_action_attains_the_value_in_simulation():
    problem = LinearGaussian(
        [[0.0, 1.0], [0.0, 0.0]], [[0.0], [1.0]], np.eye(2), 0.5, [[0.0], [0.4]], horizon=1.0, terminal_cost=np.eye(2)
    )
    start = torch.tensor([[1.5, 1.0]], dtype=torch.float64)

    def attained(scale, num_steps=200, num_paths=4000):
        rng = torch.Generator().manual_seed(0)
        x, total, dt = start.expand(num_paths, -1), torch.zeros(num_paths, dtype=torch.float64), 1 / num_steps
        for step in range(num_steps):
            a = scale * problem.optimal_action(step * dt, x)
            noise = torch.randn(num_paths, 1, dtype=torch.float64, generator=rng)
            total = total + problem.reward(x, a) * dt
            x = x + problem.drift(x, a) * dt + (problem.diffusion(x, a) @ noise.unsqueeze(-1)).squeeze(-1) * dt**0.5
        return (total + problem.terminal_reward(x)).mean().item()

    exact = problem.value(0.0, start).item()
    assert attained(1.0) == pytest.approx(exact, rel=0.01)
    assert attained(0.5) < 1.03 * exact
    assert attained(1.5) < 1.03 * exact


def test_a_long_discounted_horizon_is_the_stationary_regulator():
    stationary = StochasticLQR.example()
    problem = LinearGaussian(-0.5, 1.0, 1.0, 0.1, 0.3, horizon=150.0, discount=0.1)
    x = torch.tensor([[0.0], [1.5]], dtype=torch.float64)
    assert (problem.value(0.0, x) - stationary.value(x)).abs().max() < 1e-6
    assert problem.gain(0.0)[0].item() == pytest.approx(stationary.solution().K.item(), rel=1e-9)


def test_a_batch_of_times_gives_what_each_time_gives():
    problem = moving_problem(0.3)
    rng = torch.Generator().manual_seed(2)
    x, a = (torch.randn(4, size, dtype=torch.float64, generator=rng) for size in (3, 2))
    times = torch.tensor([0.3, 0.0, 1.3, 0.3], dtype=torch.float64)
    for function in (
        lambda t, x, a: problem.value(t, x),
        lambda t, x, a: problem.optimal_action(t, x),
        lambda t, x, a: problem.drift(x, a, t),
        lambda t, x, a: problem.diffusion(x, a, t),
        lambda t, x, a: problem.reward(x, a, t),
    ):
        together = function(times, x, a)
        for k in range(4):
            torch.testing.assert_close(together[k : k + 1], function(float(times[k]), x[k : k + 1], a[k : k + 1]))


def test_a_value_that_escapes_to_infinity_is_refused_with_the_time():
    # dP/dt = P^2 from P(T) = -1 escapes at T - 1.
    LinearGaussian(0.0, 1.0, 0.0, 1.0, 1.0, horizon=0.9, terminal_cost=-1.0)
    with pytest.raises(ValueError, match=r"infinite before t = 0\.5"):
        LinearGaussian(0.0, 1.0, 0.0, 1.0, 1.0, horizon=1.5, terminal_cost=-1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"R": 0.0}, "R must be positive definite"),
        ({"R": lambda t: 1.0 - 2 * t}, r"R must be positive definite.*t = 0\.5"),
        ({"Q": np.eye(2)}, "Q must be a matrix"),
        ({"offset": [1.0, 2.0]}, r"offset must have shape \(1,\)"),
        ({"horizon": 0.0}, "horizon > 0"),
        ({"discount": -0.1}, "discount >= 0"),
    ],
)
def test_ill_posed_problems_are_refused(change, message):
    arguments = {"A": -1.0, "B": 1.0, "Q": 1.0, "R": 1.0, "D": 1.0, "horizon": 1.0}
    problem = LinearGaussian(**arguments)
    with pytest.raises(ValueError, match=message):
        LinearGaussian(**(arguments | change))
    with pytest.raises(ValueError, match="time must be in"):
        problem.gain(1.1)
