import math

import pytest
import torch

from ddpo.control.problems.lqr import StochasticLQR
from ddpo.control.solvers.networks import uniform_box
from ddpo.control.solvers.q_learning import QLearningConfig, advantage_rate_target, one_step_target, q_learning
from ddpo.control.solvers.transitions import Transitions

F64 = torch.float64


def exact_q(problem, x, a):
    """Q = (r + V' f + sigma^2 V'' / 2) / rho of the scalar example."""
    P = problem.solution().P.item()
    lie = -P * x[:, 0] * problem.drift(x, a)[:, 0] - 0.5 * 0.09 * P
    return (problem.reward(x, a) + lie) / problem.discount


def mean_targets(problem, x, a, dt):
    """Both targets averaged over the noise: exact for quadratic values with two equally likely signs."""
    targets = {}
    for sign in (1.0, -1.0):
        next_state = x + problem.drift(x, a) * dt + sign * 0.3 * dt**0.5
        batch = Transitions(state=x, action=a, reward=problem.reward(x, a), next_state=next_state, dt=dt)
        value, next_value = problem.value(x), problem.value(next_state)
        rate = advantage_rate_target(batch, value, next_value, problem.discount)
        plain = one_step_target(batch, next_value, problem.discount)
        for name, target in (("rate", rate), ("plain", plain)):
            targets[name] = targets.get(name, 0) + 0.5 * target
    return targets


def grid():
    x = torch.linspace(-2, 2, 7, dtype=F64).repeat_interleave(5)[:, None]
    a = torch.linspace(-4, 4, 5, dtype=F64).repeat(7)[:, None]
    return x, a


def test_advantage_rate_target_converges_to_q_and_the_usual_target_does_not():
    problem, (x, a) = StochasticLQR.example(), grid()
    q, v = exact_q(problem, x, a), problem.value(x)
    errors = {}
    for dt in (0.01, 0.005):
        targets = mean_targets(problem, x, a, dt)
        errors[dt] = (targets["rate"] - q).abs().max().item()
        usual = v + problem.discount * dt * (q - v)
        # The second difference is of order dt^2: the usual target only knows V + rho dt (Q - V).
        assert (targets["plain"] - usual).abs().max() < 4 * dt**2 * q.abs().max()
    assert errors[0.01] / errors[0.005] == pytest.approx(2, rel=0.02)
    assert errors[0.005] < 0.02 * q.abs().max()


def test_usual_target_forgets_the_action_in_proportion_to_the_step():
    problem, (x, a) = StochasticLQR.example(), grid()
    spread = {}
    for dt in (0.1, 0.01, 0.001):
        targets = mean_targets(problem, x, a, dt)
        spread[dt] = {name: target.view(7, 5).std(1).mean().item() for name, target in targets.items()}
    exact = exact_q(problem, x, a).view(7, 5).std(1).mean().item()
    assert spread[0.1]["plain"] / spread[0.001]["plain"] == pytest.approx(100, rel=0.1)
    assert spread[0.001]["plain"] < 1e-3 * exact
    assert spread[0.001]["rate"] == pytest.approx(exact, rel=1e-2)


def test_greedy_action_of_the_mean_target_is_that_of_q():
    problem = StochasticLQR.example()
    a = torch.linspace(-5, 5, 10_001, dtype=F64)[:, None]
    x = torch.ones_like(a)
    best = a[mean_targets(problem, x, a, 1e-4)["rate"].argmax()].item()
    assert best == pytest.approx(-problem.solution().K.item(), abs=2e-3)


def test_targets_agree_with_their_formulas():
    batch = Transitions(
        state=torch.zeros(1, 1),
        action=torch.zeros(1, 1),
        reward=torch.tensor([2.0], dtype=F64),
        next_state=torch.zeros(1, 1),
        dt=0.5,
    )
    value, later, decay = torch.tensor([3.0], dtype=F64), torch.tensor([4.0], dtype=F64), math.exp(-0.1)
    target = advantage_rate_target(batch, value, later, 0.2).item()
    assert target == pytest.approx(3 + (1 + decay * 4 - 3) / 0.1)
    assert one_step_target(batch, later, 0.2).item() == pytest.approx(1 + 4 * decay)


def test_learns_the_gain_of_the_regulator_from_transitions():
    problem = StochasticLQR.example()
    config = QLearningConfig(num_sweeps=16, batch_size=40_000, dt=0.02, fit_steps=5)
    seen = []
    result = q_learning(
        problem,
        states=uniform_box(-2.0, 2.0),
        actions=uniform_box(-5.0, 5.0),
        config=config,
        generator=torch.Generator().manual_seed(0),
        on_sweep=seen.append,
    )
    x = torch.linspace(-1.5, 1.5, 31, dtype=F64)[:, None]
    exact = problem.optimal_action(x)
    error = ((result.policy(x) - exact).square().mean() / exact.square().mean()).sqrt().item()
    assert error < 0.12
    assert tuple(seen) == result.history
    assert seen[-1].tau < seen[0].tau
    greedy, idle = result.critic(x, exact), result.critic(x, torch.zeros_like(x))
    assert (greedy - idle)[x[:, 0].abs() > 0.5].min() > 0


def test_wrong_arguments_are_refused():
    for wrong in ({"dt": 0.0}, {"tau": -1.0}, {"num_sweeps": 1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be"):
            QLearningConfig(**wrong)
