import math

import numpy as np
import pytest
import torch

from ddpo.control.problems.lqr import StochasticLQR
from ddpo.control.problems.merton import Merton
from ddpo.control.solvers.simulate import closed_loop_value, estimate, integrate, require_finite_value, simulate, step

F64 = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def second_moment(scheme, dt, rate=3.0, sigma=0.3, time=0.3):
    """E X^2 after `time` of the scheme's chain for dX = -rate X dt + sigma dW, X_0 = 1, by its recursion."""
    z = rate * dt
    factor = 1 - z if scheme == "euler" else 1 - z + z * z / 2
    noise = sigma * math.sqrt(dt) * (1.0 if scheme == "euler" else 1 - z / 2)
    moment = 1.0
    for _ in range(round(time / dt)):
        moment = factor**2 * moment + noise**2
    return moment


@pytest.mark.parametrize("scheme", ["euler", "heun"])
def test_simulated_second_moment_is_that_of_the_schemes_recursion(scheme):
    problem = StochasticLQR(-3.0, 1.0, 1.0, 1.0, 0.3, discount=0.1)
    x = torch.ones(40_000, 1, dtype=F64)
    paths = simulate(problem, torch.zeros_like, x, dt=0.1, num_steps=3, generator=rng(), scheme=scheme)
    squares = paths.states[-1].square()
    z = (squares.mean() - second_moment(scheme, 0.1)) / (squares.std() / len(squares) ** 0.5)
    assert abs(z) < 4
    other = second_moment("heun" if scheme == "euler" else "euler", 0.1)
    assert abs(squares.mean() - other) / (squares.std() / len(squares) ** 0.5) > 8


def test_weak_orders_are_one_and_two():
    exact = math.exp(-1.8) + 0.09 / 6 * (1 - math.exp(-1.8))
    for scheme, order in (("euler", 1), ("heun", 2)):
        errors = [abs(second_moment(scheme, dt) - exact) for dt in (0.003, 0.0015)]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_one_heun_step_averages_the_drifts_at_both_ends():
    problem = StochasticLQR.example()
    x, noise = torch.tensor([[1.5]], dtype=F64), torch.tensor([[0.7]], dtype=F64)
    gain, dt = 2.0, 0.1
    first = (-0.5 - gain) * 1.5
    predicted = 1.5 + first * dt + 0.3 * dt**0.5 * 0.7
    expected = 1.5 + 0.5 * (first + (-0.5 - gain) * predicted) * dt + 0.3 * dt**0.5 * 0.7
    obtained = step(problem, lambda y: -gain * y, x, -gain * x, noise, dt=dt, scheme="heun")
    assert obtained.item() == pytest.approx(expected, abs=1e-14)


def test_log_euler_is_exact_in_one_long_step_and_euler_is_not():
    problem = Merton()
    a = torch.tensor([0.9, 0.06], dtype=F64)
    x = torch.full((200_000, 1), 1.3, dtype=F64)
    mean = {}
    for scheme in ("log_euler", "euler"):
        paths = simulate(problem, lambda y: a.expand(len(y), 2), x, dt=10, num_steps=1, generator=rng(), scheme=scheme)
        logs = (paths.states[-1].clamp(min=1e-9) / 1.3).log()
        mean[scheme] = (float(logs.mean()), float(logs.std()))
    growth = (0.03 + 0.9 * 0.05 - 0.06 - 0.5 * 0.18**2) * 10
    assert mean["log_euler"] == pytest.approx((growth, 0.18 * 10**0.5), abs=6e-3)
    assert abs(mean["euler"][0] - growth) > 0.03


def test_closed_loop_value_agrees_with_lyapunov():
    problem = StochasticLQR.example()
    x = torch.full((2000, 1), 1.5, dtype=F64)
    P, c = problem.policy_value(1.0)
    value = closed_loop_value(problem, lambda y: -y, x, dt=0.1, horizon=60.0, generator=rng())
    exact = -0.5 * P.item() * 1.5**2 - c
    assert abs(value.mean - exact) < 4 * value.standard_error + 5e-3
    best, _ = problem.policy_value(problem.solution().K)
    assert abs(value.mean + 0.5 * best.item() * 1.5**2) > 0.1


def test_closed_loop_value_of_the_second_riccati_roots_policy_is_far_below_what_its_value_says():
    problem, root = StochasticLQR.example(), -0.37597507691408064
    x = torch.full((64, 1), 0.5, dtype=F64)
    claimed = -0.5 * root * 0.25 - 0.45 * root
    achieved = closed_loop_value(problem, lambda y: -10 * root * y, x, dt=0.1, horizon=10.0, generator=rng())
    assert claimed > 0
    assert achieved.mean < -1e6


def test_antithetic_noise_cancels_in_a_linear_drift():
    problem = StochasticLQR.example()
    paths = simulate(
        problem, torch.zeros_like, torch.ones(2, 1, dtype=F64), dt=0.1, num_steps=5, generator=rng(), antithetic=True
    )
    assert paths.states[-1].mean().item() == pytest.approx((1 - 0.05 + 0.00125) ** 5, abs=1e-14)


def test_trapezoid_has_order_two_and_rectangle_order_one():
    errors = {}
    for scheme in ("euler", "heun"):
        for count in (50, 100):
            times = torch.linspace(0, 2, count + 1, dtype=F64)
            integral = integrate(torch.cos(times)[:, None], times, 0.3, scheme=scheme)[-1].item()
            fine = np.linspace(0, 2, 200_001)
            exact = np.trapezoid(np.exp(-0.3 * fine) * np.cos(fine), fine)
            errors[scheme, count] = abs(integral - exact)
    assert errors["heun", 50] / errors["heun", 100] == pytest.approx(4, rel=0.02)
    assert errors["euler", 50] / errors["euler", 100] == pytest.approx(2, rel=0.02)


def test_policy_without_a_finite_value_is_refused_with_the_cure():
    problem = StochasticLQR(1.0, 1.0, 1.0, 0.1, 0.3, discount=0.1)
    x = torch.linspace(-2, 2, 32, dtype=F64)[:, None]
    with pytest.raises(ValueError, match="stabilises the state, or begin with larger discount"):
        require_finite_value(problem, torch.zeros_like, x, generator=rng())
    require_finite_value(problem, lambda y: -2 * y, x, generator=rng())


def test_wrong_arguments_are_refused():
    problem, x = StochasticLQR.example(), -torch.ones(3, 1, dtype=F64)
    for wrong, message in (
        ({"dt": -0.1}, "dt must be positive"),
        ({"scheme": "milstein"}, "scheme must be"),
        ({"scheme": "log_euler"}, "positive states"),
        ({"antithetic": True}, "even number"),
    ):
        with pytest.raises(ValueError, match=message):
            simulate(problem, torch.zeros_like, x, **({"dt": 0.1, "num_steps": 2, "generator": rng()} | wrong))
    with pytest.raises(ValueError, match="at least 2"):
        estimate(torch.zeros(1))
