import numpy as np
import pytest
import torch

from ddpo.control.problems.lqr import StochasticLQR
from ddpo.control.problems.merton import Merton
from ddpo.control.solvers.evaluation import RolloutConfig, evaluate_collocation, evaluate_monte_carlo, evaluate_residual
from ddpo.control.solvers.generator import hjb_residual
from ddpo.control.solvers.improvement import maximise_hamiltonian
from ddpo.control.solvers.networks import Actor, PowerMLP, QuadraticMLP, uniform_box
from ddpo.control.solvers.policy_iteration import PolicyIterationConfig, policy_iteration, with_discount

F64 = torch.float64
BOX = uniform_box(-2.0, 2.0)


BRIEF = {"closed_loop_paths": 4, "closed_loop_horizon": 0.5}
"""Where a test does not look at the closed loop."""


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def nothing(x):
    return torch.zeros_like(x)


def gain_error(problem, policy, dim=1):
    x = uniform_box(-1.5, 1.5, dim=dim)(200, rng(9))
    exact = problem.optimal_action(x)
    return ((policy(x) - exact).square().mean() / exact.square().mean()).sqrt().item()


def solve(problem, config, start=nothing, seed=0, **network):
    generator = rng(seed)
    value = QuadraticMLP(problem.state_dim, generator=generator, scale=2.0, **network)
    return policy_iteration(problem, value, start, BOX, config=config, generator=generator)


def euler_fixed_point(dt):
    """The gain at which improving the exact value of the Euler chain with left rectangles changes nothing."""
    gain = 2.66
    for _ in range(200):
        decay = np.exp(-0.1 * dt) * (1 - (gain + 0.5) * dt) ** 2
        gain = 10 * (1 + 0.1 * gain**2) * dt / (1 - decay)
    return gain


@pytest.mark.parametrize("skip", [True, False])
def test_collocation_finds_the_riccati_gain_to_a_thousandth(skip):
    problem = StochasticLQR.example()
    config = PolicyIterationConfig(
        num_iterations=8, value_steps=60, closed_loop_paths=64, closed_loop_dt=0.1, closed_loop_horizon=30.0
    )
    result = solve(problem, config, skip=skip)
    assert gain_error(problem, result.policy) < 1e-3
    x = torch.linspace(-1.5, 1.5, 21, dtype=F64)[:, None]
    assert (result.value(x) - problem.value(x)).abs().max() < 2e-3
    first, last = result.history[0], result.history[-1]
    assert first.hjb_residual > 100 * last.hjb_residual
    assert first.achieved is None
    assert abs(last.shortfall.mean) < 4 * last.shortfall.standard_error + 0.02


def test_iterates_are_those_of_kleinman():
    problem = StochasticLQR.example()
    gain, gains = 0.0, []
    for _ in range(3):
        P, _ = problem.policy_value(gain)
        gain = 10 * P.item()
        gains.append(gain)
    for count in (1, 2, 3):
        config = PolicyIterationConfig(num_iterations=count, **BRIEF)
        policy = solve(problem, config, width=16, depth=1).policy
        slope = -policy(torch.ones(1, 1, dtype=F64)).item()
        assert slope == pytest.approx(gains[count - 1], rel=2e-3)
    assert gains[1] / gains[2] > 1.1


def test_a_network_on_the_second_root_has_no_residual_and_a_policy_that_diverges():
    problem, root = StochasticLQR.example(), -0.37597507691408064
    value = QuadraticMLP(1, generator=rng())
    with torch.no_grad():
        value.curvature.fill_(-root)
        value.mlp.output.bias.fill_(-0.45 * root)

    def maximiser(x, gradient, hessian):
        return maximise_hamiltonian(problem, x, gradient, hessian, torch.zeros_like(x))

    x = BOX(64, rng())
    assert hjb_residual(value, problem, x, maximiser).abs().max() < 1e-13
    actor = Actor(1, 1, generator=rng())
    with torch.no_grad():
        actor.gain.fill_(-10 * root)
    with pytest.raises(ValueError, match="no finite value"):
        policy_iteration(problem, value, actor, BOX, config=PolicyIterationConfig(), generator=rng())


@pytest.mark.parametrize("evaluate", [evaluate_monte_carlo, evaluate_residual])
def test_targets_leave_the_exact_value_of_a_policy_where_it_is(evaluate):
    problem = StochasticLQR.example()
    P, c = problem.policy_value(1.5)
    value = QuadraticMLP(1, generator=rng())
    with torch.no_grad():
        value.curvature.fill_(-P.item())
        value.mlp.output.bias.fill_(-c)
    x = BOX(256, rng())
    rollouts = RolloutConfig(dt=0.05, horizon=1.0, num_paths=16)
    evaluate(
        problem,
        value,
        lambda y: -1.5 * y,
        x,
        rollouts=rollouts,
        max_steps=20,
        relative=False,
        generator=rng(),
    )
    moved = (value(x) - (-0.5 * P.item() * x[:, 0] ** 2 - c)).abs().max().item()
    assert moved < (1e-12 if evaluate is evaluate_residual else 2e-2)
    assert moved > 1e-4 or evaluate is evaluate_residual


def test_collocation_solves_the_linear_equation_of_a_policy_that_is_not_optimal():
    problem = StochasticLQR.example()
    P, c = problem.policy_value(1.0)
    value, x = QuadraticMLP(1, generator=rng(), scale=2.0), BOX(256, rng())
    residual = evaluate_collocation(problem, value, lambda y: -y, x, max_steps=200, relative=False)
    exact = -0.5 * P.item() * x[:, 0] ** 2 - c
    assert residual < 1e-3
    assert (value(x) - exact).abs().max() < 5e-3
    assert (problem.value(x) - exact).abs().max() > 0.2


def test_monte_carlo_as_in_the_textbook_has_the_gain_of_its_chain():
    problem = StochasticLQR.example()
    rollouts = RolloutConfig(dt=0.05, horizon=1.0, scheme="euler", num_paths=4)
    config = PolicyIterationConfig(
        evaluate="monte_carlo", num_iterations=7, num_points=512, value_steps=30, rollouts=rollouts, **BRIEF
    )
    policy = solve(problem, config, width=8, depth=1).policy
    x = torch.linspace(-1.5, 1.5, 61, dtype=F64)[:, None]
    slope = -(policy(x) * x).sum().item() / x.square().sum().item()
    expected = euler_fixed_point(0.05)
    assert expected / problem.solution().K.item() - 1 == pytest.approx(0.10218, abs=1e-4)
    assert slope == pytest.approx(expected, rel=1.5e-2)


def test_actor_reaches_the_greedy_policy():
    problem = StochasticLQR.example()
    actor = Actor(1, 1, generator=rng(1))
    config = PolicyIterationConfig(improve="actor", num_iterations=7, value_steps=80, **BRIEF)
    result = solve(problem, config, start=actor, width=16, depth=1)
    assert result.policy is actor
    assert gain_error(problem, actor) < 3e-3


def test_unstable_system_needs_a_stabilising_policy_or_larger_discounts():
    problem = StochasticLQR(1.0, 1.0, 1.0, 0.1, 0.3, discount=0.1)
    config = PolicyIterationConfig(num_iterations=6, value_steps=80, **BRIEF)
    small = {"width": 16, "depth": 1}
    with pytest.raises(ValueError, match="begin with larger discount rates"):
        solve(problem, config)
    assert gain_error(problem, solve(problem, config, start=lambda x: -2 * x, **small).policy) < 1e-3
    config = PolicyIterationConfig(num_iterations=9, value_steps=80, **BRIEF, discounts=(8.0, 8.0, 2.0))
    result = solve(problem, config, **small)
    assert [record.discount for record in result.history[:4]] == [8.0, 8.0, 2.0, 0.1]
    assert gain_error(problem, result.policy) < 1e-3


def test_two_dimensions_with_two_actions():
    problem = StochasticLQR(
        [[-0.5, 1.0], [0.0, -0.3]], [[1.0, 0.2], [0.0, 1.0]], np.eye(2), 0.2 * np.eye(2), 0.3 * np.eye(2), discount=0.1
    )
    generator = rng()
    value = QuadraticMLP(2, generator=generator, scale=2.0, width=16, depth=1)
    result = policy_iteration(
        problem,
        value,
        nothing,
        uniform_box(-2.0, 2.0, dim=2),
        config=PolicyIterationConfig(num_iterations=8, num_points=400, **BRIEF),
        generator=generator,
    )
    assert gain_error(problem, result.policy, dim=2) < 2e-3


def test_mertons_controls_by_monte_carlo_with_exact_steps():
    problem, generator = Merton(), rng()
    logs = uniform_box(-1.5, 1.5)
    actor = Actor(
        1,
        2,
        generator=generator,
        width=8,
        features=torch.log,
        transform=lambda z: torch.stack([0.3 + z[:, 0], 0.03 * torch.exp(z[:, 1])], 1),
    )
    config = PolicyIterationConfig(
        evaluate="monte_carlo",
        improve="actor",
        num_iterations=14,
        num_points=1024,
        value_steps=30,
        relative=True,
        rollouts=RolloutConfig(dt=1.0, horizon=10.0, scheme="log_euler", num_paths=32),
        closed_loop_scheme="log_euler",
        closed_loop_dt=1.0,
    )
    policy_iteration(
        problem,
        PowerMLP(sign=-1, generator=generator),
        actor,
        lambda count, source: logs(count, source).exp(),
        config=config,
        generator=generator,
    )
    x = torch.linspace(-1.2, 1.2, 21, dtype=F64).exp()[:, None]
    error = (actor(x) / problem.optimal_action(x) - 1).abs().mean(0)
    assert error[0] < 0.02
    assert error[1] < 0.01


def test_on_iteration_sees_every_record_and_the_closed_loop_when_asked():
    seen = []
    problem, generator = StochasticLQR.example(), rng()
    config = PolicyIterationConfig(num_iterations=2, value_steps=5, closed_loop_every=1, **BRIEF)
    result = policy_iteration(
        problem,
        QuadraticMLP(1, generator=generator),
        nothing,
        BOX,
        config=config,
        generator=generator,
        on_iteration=seen.append,
    )
    assert tuple(seen) == result.history
    assert all(record.achieved is not None for record in seen)


def test_same_generator_same_result():
    problem = StochasticLQR.example()
    config = PolicyIterationConfig(num_iterations=1, value_steps=5, **BRIEF)
    x = BOX(5, rng())
    torch.testing.assert_close(solve(problem, config).value(x), solve(problem, config).value(x), rtol=0, atol=0)


def test_discount_wrapper_changes_only_the_rate():
    problem = StochasticLQR.example()
    other, x = with_discount(problem, 0.7), BOX(4, rng())
    assert other.discount == 0.7
    torch.testing.assert_close(other.drift(x, x), problem.drift(x, x))
    with pytest.raises(ValueError, match="positive"):
        with_discount(problem, 0.0)


def test_wrong_arguments_are_refused():
    problem = StochasticLQR.example()
    for wrong, message in (
        ({"evaluate": "guess"}, "evaluate must be"),
        ({"improve": "hope"}, "improve must be"),
        ({"num_points": 0}, "at least 1"),
        ({"discounts": (1.0,), "num_iterations": 1}, "leave none"),
    ):
        with pytest.raises(ValueError, match=message):
            PolicyIterationConfig(**wrong)
    with pytest.raises(ValueError, match="trains the policy"):
        solve(problem, PolicyIterationConfig(improve="actor"))
    with pytest.raises(ValueError, match="float64"):
        solve(problem, PolicyIterationConfig(), dtype=torch.float32)
    with pytest.raises(ValueError, match="0 < dt <= horizon"):
        RolloutConfig(dt=1.0, horizon=0.5)
