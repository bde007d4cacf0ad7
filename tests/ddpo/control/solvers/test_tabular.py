from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from ddpo.control.problems.shaping import shaped
from ddpo.control.solvers.tabular import (
    TabularMDP,
    greedy_policy,
    policy_evaluation,
    policy_iteration,
    proper_policy,
    q_values,
    spaceship,
    value_iteration,
)

CONSERVE, EXPLORE = 0, 1
ORDERS = ("synchronous", "in_place", "prioritised")


def random_mdp(seed, num_states=6, num_actions=3, discount=0.8):
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.ones(num_states), size=(num_states, num_actions))
    transition = (transition + 1e-6) / (transition + 1e-6).sum(-1, keepdims=True)  # HiGHS drops entries below 1e-9
    return TabularMDP(transition=transition, reward=rng.normal(size=(num_states, num_actions)), discount=discount)


def corridor(discount=1.0):
    """Cells 0 to 3 with the exit at 3; left and right move, each step costs 1, and the left wall blocks."""
    transition = np.zeros((4, 2, 4))
    for cell, (action, move) in product(range(3), enumerate((-1, 1))):
        transition[cell, action, max(cell + move, 0)] = 1
    transition[3, :, 3] = 1
    reward = np.where(np.arange(4)[:, None] < 3, -1.0, 0.0) * np.ones((4, 2))
    return TabularMDP(transition=transition, reward=reward, discount=discount, state_names=("a", "b", "c", "exit"))


def by_linear_programming(mdp):
    """Least v with v >= r + gamma P v (d'Epenoux 1963)."""
    a_ub = mdp.discount * mdp.transition.reshape(-1, mdp.num_states)
    a_ub = a_ub - np.repeat(np.eye(mdp.num_states), mdp.num_actions, axis=0)
    return linprog(np.ones(mdp.num_states), A_ub=a_ub, b_ub=-mdp.reward.ravel(), bounds=(None, None)).x


def test_spaceship_value_iteration_takes_the_printed_steps():
    values = value_iteration(spaceship()).values
    assert values[1].tolist() == [2, 1, 0]
    assert values[2].tolist() == [2.75, 1.75, 0]


def test_spaceship_value_iteration_error_is_three_halves_halved_each_sweep():
    values = value_iteration(spaceship()).values
    for k in range(1, 20):
        assert np.abs(values[k] - [3.5, 2.5, 0]).max() == 3 * 0.5**k
    assert np.abs(values[0] - [3.5, 2.5, 0]).max() == 3.5


def test_spaceship_fixed_point_is_exact():
    trace = policy_iteration(spaceship())
    assert trace.values[-1].tolist() == [3.5, 2.5, 0]
    assert trace.policies[-1][:2].tolist() == [EXPLORE, CONSERVE]
    assert trace.values[0].tolist() == [2, 2, 0]
    assert trace.converged


def test_spaceship_one_sweep_policy_iteration_has_the_policy_after_two_iterations_but_not_the_values():
    trace = policy_iteration(spaceship(), initial_policy=[CONSERVE] * 3, sweeps=1)
    assert trace.values[0].tolist() == [1, 1, 0]
    assert trace.values[1].tolist() == [2.5, 1.5, 0]
    assert trace.policies[1].tolist() == trace.policies[2].tolist() == [EXPLORE, CONSERVE, CONSERVE]
    q = q_values(spaceship(), trace.values[1])
    assert q[:2].tolist() == [[2.25, 3], [2, -10]]
    assert np.abs(trace.values[1] - [3.5, 2.5, 0]).max() == 1
    assert trace.converged
    np.testing.assert_allclose(trace.values[-1], [3.5, 2.5, 0], atol=1e-10)
    assert not policy_iteration(spaceship(), sweeps=1, max_iterations=2).converged


@pytest.mark.parametrize("order", ORDERS)
def test_spaceship_values_are_reached_in_every_order_of_backups(order):
    trace = value_iteration(spaceship(), order=order, tolerance=1e-12)
    assert trace.converged
    np.testing.assert_allclose(trace.values[-1], [3.5, 2.5, 0], atol=1e-12)


def test_in_place_sweeps_use_the_newest_values():
    # Full first: 2. Low then sees it: 1 + (2 + 0) / 4.
    assert value_iteration(spaceship(), order="in_place").values[1].tolist() == [2, 1.5, 0]


def test_prioritised_backups_go_to_the_largest_change():
    # Full by 2, then Low by 1.5 to 1.5, then Full to 2 + (2 + 1.5) / 4 = 2.875.
    assert value_iteration(spaceship(), order="prioritised").values[1].tolist() == [2.875, 1.5, 0]


def test_prioritised_backups_need_fewer_sweeps_where_reward_is_far():
    num_states = 20
    transition = np.zeros((num_states, 1, num_states))
    for state in range(num_states):
        transition[state, 0, min(state + 1, num_states - 1)] = 1
    reward = np.zeros((num_states, 1))
    reward[-2] = 1
    mdp = TabularMDP(transition=transition, reward=reward, discount=0.9)
    sweeps = {order: len(value_iteration(mdp, order=order).values) - 1 for order in ORDERS}
    assert sweeps["prioritised"] == 1
    assert sweeps["synchronous"] == num_states - 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), discount=st.sampled_from([0.0, 0.5, 0.9]), num_actions=st.integers(1, 4))
def test_policy_iteration_value_iteration_and_linear_programming_agree(seed, discount, num_actions):
    mdp = random_mdp(seed, num_actions=num_actions, discount=discount)
    exact = by_linear_programming(mdp)
    trace = policy_iteration(mdp)
    assert trace.converged
    np.testing.assert_allclose(trace.values[-1], exact, rtol=0, atol=1e-11)
    np.testing.assert_allclose(policy_iteration(mdp, sweeps=3, tolerance=1e-8).values[-1], exact, rtol=0, atol=1.01e-8)
    for order in ORDERS:
        values = value_iteration(mdp, order=order, tolerance=1e-8).values[-1]
        np.testing.assert_allclose(values, exact, rtol=0, atol=1.01e-8)
    assert (greedy_policy(mdp, exact) == trace.policies[-1]).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_policy_iteration_never_lowers_a_value(seed):
    values = policy_iteration(random_mdp(seed)).values
    for before, after in zip(values, values[1:], strict=False):
        assert (after >= before - 1e-12).all()


def test_policy_iteration_finds_the_best_of_all_policies():
    mdp = random_mdp(0, num_states=4)
    best = np.max([policy_evaluation(mdp, policy) for policy in product(range(3), repeat=4)], axis=0)
    np.testing.assert_allclose(policy_iteration(mdp).values[-1], best, atol=1e-12)


def test_policy_evaluation_is_the_mean_return_of_simulated_episodes():
    mdp = random_mdp(1, num_states=4, discount=0.7)
    rng = np.random.default_rng(0)
    policy = rng.dirichlet(np.ones(3), size=4)
    exact = policy_evaluation(mdp, policy)
    state, returns, discount = np.full(40_000, 2), np.zeros(40_000), 1.0
    for _ in range(60):
        action = (rng.random((len(state), 1)) > policy[state].cumsum(-1)).sum(-1).clip(max=2)
        returns += discount * mdp.reward[state, action]
        discount *= mdp.discount
        state = (rng.random((len(state), 1)) > mdp.transition[state, action].cumsum(-1)).sum(-1).clip(max=3)
    error = returns.std() / 200
    assert abs(returns.mean() - exact[2]) < 4 * error
    assert np.abs(policy_evaluation(mdp, [0] * 4) - exact).max() > 20 * error


def test_many_sweeps_are_the_linear_solve():
    mdp = random_mdp(2)
    np.testing.assert_allclose(policy_evaluation(mdp, [0] * 6, sweeps=200), policy_evaluation(mdp, [0] * 6), atol=1e-12)


def test_ties_go_to_the_lowest_action_also_within_rounding():
    mdp = TabularMDP(transition=np.ones((1, 3, 1)), reward=[[0.3, 0.1 + 0.2, 0.3]], discount=0.5)
    assert mdp.reward[0, 1] > mdp.reward[0, 0]
    assert greedy_policy(mdp, [0.0]).tolist() == [0]


def test_rewards_on_transitions_are_averaged():
    mdp = spaceship()
    on_transitions = np.zeros((3, 2, 3))
    on_transitions[0, 0, 0], on_transitions[0, 1, 0], on_transitions[0, 1, 1] = 1, 3, 1
    on_transitions[1, 0, :2], on_transitions[1, 1, 2] = (0.5, 1.5), -10
    other = TabularMDP(transition=mdp.transition, reward=on_transitions, discount=0.5)
    assert other.reward.tolist() == mdp.reward.tolist()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_shaping_subtracts_the_potential_and_keeps_every_preference(seed):
    mdp = random_mdp(seed)
    potential = 10 * np.random.default_rng(seed + 1).normal(size=6)
    new, old = policy_iteration(shaped(mdp, potential)), policy_iteration(mdp)
    assert (new.policies[-1] == old.policies[-1]).all()
    np.testing.assert_allclose(new.values[-1], old.values[-1] - potential, atol=1e-9)
    no_discount = mdp.reward + mdp.transition @ potential - potential[:, None]
    mistaken = TabularMDP(transition=mdp.transition, reward=no_discount, discount=mdp.discount)
    assert np.abs(policy_iteration(mistaken).values[-1] - old.values[-1] + potential).max() > 1e-3


def test_shaping_with_the_optimal_value_needs_one_sweep():
    mdp = spaceship()
    trace = value_iteration(shaped(mdp, [3.5, 2.5, 0]))
    assert trace.converged
    assert len(trace.values) == 1


def test_a_potential_in_a_terminal_state_would_change_the_optimal_policy_and_is_refused():
    mdp = spaceship()
    phi = np.array([0, 0, 100.0])
    with pytest.raises(ValueError, match="0 in terminal states"):
        shaped(mdp, phi)
    reward = mdp.reward + mdp.discount * mdp.transition @ phi - phi[:, None]
    reward[2] = 0
    bribed = TabularMDP(transition=mdp.transition, reward=reward, discount=0.5)
    assert policy_iteration(bribed).policies[-1][1] == EXPLORE


def test_undiscounted_shortest_path_is_solved_by_each_method():
    mdp = corridor()
    assert policy_iteration(mdp).values[-1].tolist() == [-3, -2, -1, 0]
    for order in ORDERS:
        assert value_iteration(mdp, order=order).values[-1].tolist() == [-3, -2, -1, 0]
    assert proper_policy(mdp).tolist() == [1, 1, 1, 0]


def test_a_policy_that_never_ends_has_no_undiscounted_value():
    with pytest.raises(ValueError, match="not proper: from state a"):
        policy_evaluation(corridor(), [0, 0, 0, 0])
    np.testing.assert_allclose(policy_evaluation(corridor(0.9), [0, 0, 0, 0]), [-10, -10, -10, 0])
    assert np.isfinite(policy_evaluation(corridor(), np.full((4, 2), 0.5))).all()


def test_discount_one_without_a_way_out_is_refused():
    stuck = np.zeros((2, 1, 2))
    stuck[:, 0, 0] = 1
    TabularMDP(transition=stuck, reward=[[1.0], [0.0]], discount=0.99)
    with pytest.raises(ValueError, match="no policy is proper: state 0"):
        TabularMDP(transition=stuck, reward=[[1.0], [0.0]], discount=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transition": np.full((2, 1, 2), 0.4)}, r"transition\[0, 0\] is no distribution"),
        ({"transition": np.array([[[1.5, -0.5]], [[0, 1]]])}, "no distribution"),
        ({"transition": np.full((2, 1, 2), np.nan)}, "no distribution"),
        ({"transition": np.ones((2, 2))}, "must have shape"),
        ({"reward": np.zeros((2, 2))}, r"reward must have shape \(2, 1\)"),
        ({"reward": np.array([[np.inf], [0]])}, "finite"),
        ({"discount": 1.1}, r"discount must be in \[0, 1\], got 1.1"),
        ({"discount": -0.1}, "discount must be in"),
        ({"discount": float("nan")}, "discount must be in"),
        ({"state_names": ("one",)}, "2 state_names"),
    ],
)
def test_ill_formed_processes_are_refused(change, message):
    arguments = {"transition": np.full((2, 1, 2), 0.5), "reward": np.zeros((2, 1)), "discount": 0.9}
    TabularMDP(**arguments)
    with pytest.raises(ValueError, match=message):
        TabularMDP(**(arguments | change))


def test_ill_formed_arguments_are_refused():
    mdp = spaceship()
    for policy in ([0, 0], [0, 0, 2], [0, -1, 0], [0.0, 1.0, 0.0], np.full((3, 2), 0.4)):
        with pytest.raises(ValueError, match="polic|actions"):
            policy_evaluation(mdp, policy)
    with pytest.raises(ValueError, match="values must have shape"):
        q_values(mdp, [0.0])
    with pytest.raises(ValueError, match="order must be"):
        value_iteration(mdp, order="random")
    with pytest.raises(ValueError, match="sweeps must be at least 1"):
        policy_evaluation(mdp, [0, 0, 0], sweeps=0)
