"""Potential-based shaping: it telescopes, leaves the optimum of a tabular process and the expected gradient alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpo.control.problems.shaping import horizon_q_values, shaped_horizon
from ddpo.credit.advantages import AdvantageConfig, AdvantageEstimator
from ddpo.credit.potential import check_steps, held_potential


def test_the_potential_is_held_between_measurements_and_zero_before_the_first():
    values = {1: torch.tensor([1.0, 2.0]), 3: torch.tensor([5.0, 6.0])}
    held = held_potential(values, 5)
    assert held.tolist() == [[0, 1, 1, 5, 5], [0, 2, 2, 6, 6]]
    for wrong in ({}, {5: torch.zeros(2)}):
        with pytest.raises(ValueError, match=r"steps in \[0, 5\)"):
            held_potential(wrong, 5)


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_chain_is_refused(step):
    check_steps([0, 9], 10)
    with pytest.raises(ValueError, match=f"at least 0 and below the number of denoising steps, 10, got {step}"):
        check_steps([3, step], 10)


@given(st.integers(0, 999))
def test_shaping_with_a_potential_that_ends_at_zero_leaves_every_optimal_action_of_a_tabular_process(seed):
    rng = np.random.default_rng(seed)
    steps, states, actions = 4, 3, 3
    transition = rng.dirichlet(np.ones(states), size=(states, actions))
    reward = rng.normal(size=(steps, states, actions))
    phi = np.concatenate([rng.normal(size=(steps, states)) * 10, np.zeros((1, states))])
    plain, shaped = horizon_q_values(transition, reward), horizon_q_values(
        transition, shaped_horizon(transition, reward, phi)
    )  # fmt: skip
    np.testing.assert_allclose(shaped, plain - phi[:-1, :, None], atol=1e-9)
    assert (shaped.argmax(2) == plain.argmax(2)).all()


def test_a_potential_that_does_not_end_at_zero_is_refused_as_it_would_move_the_optimum():
    transition = np.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    reward = np.zeros((1, 2, 2))
    reward[0, :, 0] = 1.0
    phi = np.array([[0.0, 0.0], [0.0, 5.0]])
    with pytest.raises(ValueError, match=r"must be 0 after the last step, got \[0\.0, 5\.0\]"):
        shaped_horizon(transition, reward, phi)
    moved = reward + np.einsum("iaj,kj->kia", transition, phi[1:]) - phi[:-1, :, None]
    assert (horizon_q_values(transition, moved).argmax(2) != horizon_q_values(transition, reward).argmax(2)).all()


def walk(theta, size, generator):
    """x_{k+1} = x_k + theta_k + noise, 3 steps; states and d log p / d theta_k."""
    states, scores = [torch.zeros(size, dtype=torch.float64)], []
    for k in range(3):
        noise = torch.randn(size, generator=generator, dtype=torch.float64)
        states.append(states[-1] + theta[k] + noise)
        scores.append(noise)
    return torch.stack(states, 1), torch.stack(scores, 1)


def test_the_gradient_with_shaping_is_unbiased_and_a_good_potential_lowers_its_variance():
    """r = x_3 with d E[r] / d theta_k = 1; phi = x_k is what the chain expects of the end at theta = 0."""
    states, scores = walk([0.0, 0.0, 0.0], 64_000, torch.Generator().manual_seed(1))
    reward, groups = states[:, -1], torch.arange(64_000) // 8
    estimator = AdvantageEstimator(AdvantageConfig(scale="none", clip=None))
    spread = {}
    for name, phi in (("plain", None), ("good", states[:, :3]), ("bad", 3 * states[:, :3].flip(0).cos())):
        result = estimator(reward, groups, [""] * 64_000, kl=None, alpha=0.0, num_steps=3, potential=phi)
        per_sample = result.values.double() * scores
        error = per_sample.std(0) / 64_000**0.5
        assert ((per_sample.mean(0) - 1).abs() < 4.5 * error).all(), name
        spread[name] = per_sample.std(0)
    assert (spread["good"][1:] < torch.tensor([0.9, 0.75]) * spread["plain"][1:]).all()
    assert (spread["bad"][1:] > spread["plain"][1:]).all()
