import control
import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import solve_continuous_are

from ddpo.control.problems.lqr import StochasticLQR, discretised_gain, richardson, solve_are, solve_discretised

SCALAR = (-0.5, 1.0, 1.0, 0.1, 0.3)
RHO = 0.1
EXACT_GAIN = 2.6597507691408064
SECOND_ROOT = -0.37597507691408064


def random_matrices(seed, n=4, m=2, w=3):
    rng = np.random.default_rng(seed)
    q, r = rng.normal(size=(n, n)), rng.normal(size=(m, m))
    return rng.normal(size=(n, n)), rng.normal(size=(n, m)), q @ q.T, r @ r.T + np.eye(m), rng.normal(size=(n, w))


def hjb_right_hand_side(problem, value, x, a):
    """r + grad V . f + tr(D D' V'') / 2 by autograd, of (B, n) states and (B, m) actions."""
    gradient = torch.func.vmap(torch.func.grad(lambda y: value(y[None])[0]))(x)
    hessian = torch.func.vmap(torch.func.hessian(lambda y: value(y[None])[0]))(x)
    sigma = problem.diffusion(x, a)
    trace = (sigma @ sigma.mT * hessian).sum((-2, -1))
    return problem.reward(x, a) + (gradient * problem.drift(x, a)).sum(-1) + 0.5 * trace


def test_scalar_solution_is_the_printed_one():
    solution = StochasticLQR.example().solution()
    assert solution.P.item() == pytest.approx(0.2659750769140807, abs=1e-15)
    assert solution.K.item() == pytest.approx(EXACT_GAIN, abs=1e-14)
    assert solution.c == pytest.approx(0.1196887846113363, abs=1e-15)


def test_second_root_solves_the_equation_but_its_policy_is_unstable_and_not_returned():
    alpha, beta, q, r, sigma = SCALAR
    roots = np.sort(np.roots([beta**2 / r, RHO - 2 * alpha, -q]))
    assert roots[0] == pytest.approx(SECOND_ROOT, abs=1e-12)
    problem = StochasticLQR.example()
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for root in roots:
        constant = sigma**2 * root / (2 * RHO)

        def value(y, root=root, constant=constant):
            return -0.5 * root * y[:, 0] ** 2 - constant

        residual = RHO * value(x) - hjb_right_hand_side(problem, value, x, -beta * root / r * x)
        assert residual.abs().max() < 1e-13
    assert problem.solution().P.item() == pytest.approx(roots[1], abs=1e-14)
    assert alpha - beta * (beta * roots[0] / r) - RHO / 2 > 0
    with pytest.raises(ValueError, match="no finite value"):
        problem.policy_value(beta * roots[0] / r)


@pytest.mark.parametrize("seed", range(3))
def test_matrix_solution_agrees_with_python_control_and_the_hamiltonian_eigenvectors(seed):
    a, b, q, r, d = random_matrices(seed)
    solution = solve_are(a, b, q, r, d, RHO)
    shifted = a - RHO / 2 * np.eye(4)
    gain, root, _ = control.lqr(shifted, b, q, r)
    np.testing.assert_allclose(solution.K, gain, rtol=1e-8)
    np.testing.assert_allclose(solution.P, root, rtol=1e-8)
    hamiltonian = np.block([[shifted, -b @ np.linalg.solve(r, b.T)], [-q, -shifted.T]])
    modes, vectors = np.linalg.eig(hamiltonian)
    stable = vectors[:, modes.real < 0]
    np.testing.assert_allclose(solution.P, (stable[4:] @ np.linalg.inv(stable[:4])).real, rtol=1e-7, atol=1e-8)
    unshifted, _, _ = control.lqr(a, b, q, r)
    assert np.abs(solution.K - unshifted).max() > 1e-3


def test_matrix_value_solves_the_hjb_equation_with_the_optimal_action_as_maximiser():
    problem = StochasticLQR(*random_matrices(3), discount=RHO)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(16, 4, dtype=torch.float64, generator=rng)
    best = problem.optimal_action(x)
    attained = hjb_right_hand_side(problem, problem.value, x, best)
    assert (attained - RHO * problem.value(x)).abs().max() < 1e-9 * problem.value(x).abs().max()
    for _ in range(5):
        other = best + 0.1 * torch.randn(best.shape, dtype=torch.float64, generator=rng)
        assert (hjb_right_hand_side(problem, problem.value, x, other) < attained).all()


def test_policy_value_is_the_discounted_integral_of_the_closed_loop_moments():
    a, b, q, r, d = random_matrices(5, n=2, m=1, w=2)
    problem = StochasticLQR(a, b, q, r, d, discount=0.4)
    gain = problem.solution().K * 1.3 + 0.05
    P, c = problem.policy_value(gain)
    loop, cost = a - b @ gain, q + gain.T @ r @ gain
    x = np.array([0.7, -1.1])

    def rate(t, state):
        second = state[:4].reshape(2, 2)
        change = loop @ second + second @ loop.T + d @ d.T
        return np.append(change.ravel(), -0.5 * np.exp(-0.4 * t) * np.trace(cost @ second))

    end = solve_ivp(rate, (0, 80), np.append(np.outer(x, x).ravel(), 0.0), rtol=1e-10, atol=1e-12).y[-1, -1]
    assert -0.5 * x @ P @ x - c == pytest.approx(end, rel=1e-7)


def test_policy_value_is_largest_at_the_optimal_gain():
    problem = StochasticLQR(*random_matrices(1), discount=RHO)
    solution = problem.solution()
    P, c = problem.policy_value(solution.K)
    np.testing.assert_allclose(P, solution.P, rtol=1e-9)
    assert c == pytest.approx(solution.c, rel=1e-9)
    rng = np.random.default_rng(0)
    for _ in range(5):
        other_P, other_c = problem.policy_value(solution.K + 0.02 * rng.normal(size=solution.K.shape))
        assert np.linalg.eigvalsh(other_P - P)[0] > -1e-9
        assert other_c > c


@pytest.mark.parametrize(
    ("dt", "bias"), [(0.1, -0.15), (0.05, -0.078), (0.02, -0.032), (0.01, -0.016), (0.005, -0.008)]
)
def test_chain_gain_has_the_known_bias(dt, bias):
    assert discretised_gain(*SCALAR, RHO, dt).item() / EXACT_GAIN - 1 == pytest.approx(bias, rel=0.02)


def test_chain_solution_is_the_fixed_point_of_its_bellman_recursion():
    a, b, q, r, d = random_matrices(2, n=2, m=1, w=2)
    dt, rho = 0.05, 0.3
    solution = solve_discretised(a, b, q, r, d, rho, dt)
    gamma, step, push = np.exp(-rho * dt), np.eye(2) + a * dt, b * dt
    P, c = np.zeros((2, 2)), 0.0
    for _ in range(4000):
        gain = np.linalg.solve(r * dt + gamma * push.T @ P @ push, gamma * push.T @ P @ step)
        closed = step - push @ gain
        P, c = (
            q * dt + gain.T @ r @ gain * dt + gamma * closed.T @ P @ closed,
            gamma * (c + 0.5 * dt * np.trace(d.T @ P @ d)),
        )
    np.testing.assert_allclose(solution.P, P, rtol=1e-9)
    np.testing.assert_allclose(solution.K, gain, rtol=1e-9)
    assert solution.c == pytest.approx(c, rel=1e-9)


def test_richardson_removes_the_first_order_of_the_step():
    fine, coarse = (discretised_gain(*SCALAR, RHO, dt) for dt in (0.01, 0.02))
    assert richardson(fine, coarse).item() / EXACT_GAIN - 1 == pytest.approx(-1.454e-4, rel=1e-3)


def test_growth_below_half_the_discount_rate_needs_no_control_and_above_it_does():
    assert solve_are(0.04, 0.0, 1.0, 1.0, 1.0, RHO).P.item() == pytest.approx(1 / (RHO - 0.08), rel=1e-12)
    with pytest.raises(ValueError, match=r"not stabilisable.*0\.06.*0\.05"):
        solve_are(0.06, 0.0, 1.0, 1.0, 1.0, RHO)


@pytest.mark.parametrize("push", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("A", [np.diag([1.0, 0.5]), np.diag([-1.0, 0.5])])
def test_a_weak_push_is_enough_where_it_can_be_computed(A, push):
    """The reference is solved in units in which both pushes are 1: x = S y."""
    S, shifted = np.diag([1.0, push]), A - 0.05 * np.eye(2)
    inverse = np.diag([1.0, 1 / push])
    scaled = solve_continuous_are(inverse @ shifted @ S, np.ones((2, 1)), S @ S, np.eye(1))
    found = solve_are(A, [[1.0], [push]], np.eye(2), 1.0, np.eye(2), 0.1)
    assert np.allclose(found.P, inverse @ scaled @ inverse, rtol=1e-8)
    closed = np.linalg.eigvals(shifted - np.array([[1.0], [push]]) @ found.K)
    assert (closed.real < 0).all()


def test_a_push_that_float64_does_not_resolve_is_refused_as_that_and_no_push_as_no_push():
    with pytest.raises(
        ValueError,
        match="stabilisable, but float64 does not hold the solution: the weakest push .* mode is 4.5e-13",
    ):
        solve_are(np.diag([1.0, 0.5]), [[1.0], [1e-12]], np.eye(2), 1.0, np.eye(2), 0.1)
    with pytest.raises(ValueError, match=r"not stabilisable: no action reaches the mode of A with growth rate 0\.5"):
        solve_are(np.diag([1.0, 0.5]), [[1.0], [0.0]], np.eye(2), 1.0, np.eye(2), 0.1)


def test_a_root_that_is_not_the_value_is_refused():
    # Doing nothing costs nothing here, so the value is 0, while the stabilising root is 2 (A - rho/2) R / B^2 = 0.9.
    gain, root, _ = control.lqr(0.5 - RHO / 2, 1.0, 0.0, 1.0)
    assert root.item() == pytest.approx(0.9)
    with pytest.raises(ValueError, match="is not the value"):
        solve_are(0.5, 1.0, 0.0, 1.0, 1.0, RHO)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": [[0.0], [1.0]], "A": np.diag([1.0, -1.0])}, "not stabilisable"),
        ({"R": [[0.0]]}, "R must be positive definite"),
        ({"R": [[-1.0]]}, "R must be positive definite"),
        ({"Q": np.diag([1.0, -0.1])}, "Q must be positive semidefinite"),
        ({"Q": [[1.0, 0.5], [0.0, 1.0]]}, "Q must be symmetric"),
        ({"A": np.eye(3)}, r"A must be a matrix of shape \(2, 2\)"),
        ({"B": [1.0, 1.0]}, "B must be a matrix"),
        ({"D": np.eye(3)}, "one row for each of the 2 states"),
        ({"A": np.full((2, 2), np.nan)}, "A must be finite"),
        ({"rho": 0.0}, "discount rate must be positive"),
    ],
)
def test_ill_posed_regulators_are_refused(change, message):
    arguments = {"A": -np.eye(2), "B": [[1.0], [1.0]], "Q": np.eye(2), "R": [[1.0]], "D": np.eye(2), "rho": RHO}
    solve_are(**arguments)
    with pytest.raises(ValueError, match=message):
        solve_are(**(arguments | change))


def test_methods_have_the_shapes_and_dtype_of_the_states():
    problem = StochasticLQR(*random_matrices(0), discount=RHO)
    x, a = torch.zeros(7, 4), torch.zeros(7, 2)
    shapes = {
        problem.drift(x, a): (7, 4),
        problem.diffusion(x, a): (7, 4, 3),
        problem.reward(x, a): (7,),
        problem.value(x): (7,),
        problem.optimal_action(x): (7, 2),
        problem.terminal_reward(x): (7,),
    }
    for result, shape in shapes.items():
        assert result.shape == shape
        assert result.dtype == torch.float32
