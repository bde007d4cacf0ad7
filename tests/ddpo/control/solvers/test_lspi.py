import numpy as np
import pytest
import torch

from ddpo.control.problems.lqr import StochasticLQR, discretised_gain
from ddpo.control.solvers.lspi import AffinePolicy, extrapolate, lspi
from ddpo.control.solvers.networks import uniform_box
from ddpo.control.solvers.transitions import Transitions, sample_transitions

SCALAR = (-0.5, 1.0, 1.0, 0.1, 0.3, 0.1)
EXACT = 2.6597507691408064


def draw(problem, dt, *, count=300_000, seed=0):
    states = uniform_box(-2.0, 2.0, dim=problem.state_dim)
    actions = uniform_box(-5.0, 5.0, dim=problem.action_dim)
    generator = torch.Generator().manual_seed(seed)
    return sample_transitions(problem, count, states=states, actions=actions, dt=dt, generator=generator)


def without_noise(problem, dt):
    """Transitions whose two signs of noise occur equally often, so that second moments are exact."""
    base = draw(problem, dt, count=2000)
    mean = base.state + problem.drift(base.state, base.action) * dt
    push = 0.3 * dt**0.5
    return Transitions(
        state=base.state.repeat(2, 1),
        action=base.action.repeat(2, 1),
        reward=base.reward.repeat(2),
        next_state=torch.cat([mean + push, mean - push]),
        dt=dt,
    )


@pytest.mark.parametrize("dt", [0.1, 0.02, 0.01])
def test_gain_is_exactly_that_of_the_chain_when_the_noise_averages_out(dt):
    result = lspi(without_noise(StochasticLQR.example(), dt), 0.1, AffinePolicy.zero(1, 1))
    chain = discretised_gain(*SCALAR, dt).item()
    assert result.policy.gain.item() == pytest.approx(chain, rel=1e-9)
    assert abs(chain / EXACT - 1) > 0.015
    assert result.policy.offset.abs().item() < 1e-9


def test_sampled_gain_is_that_of_the_chain_within_its_noise():
    gains = [
        lspi(draw(StochasticLQR.example(), 0.05, seed=seed), 0.1, AffinePolicy.zero(1, 1)).policy.gain.item()
        for seed in range(4)
    ]
    chain = discretised_gain(*SCALAR, 0.05).item()
    assert np.mean(gains) == pytest.approx(chain, rel=5e-3)
    assert abs(np.mean(gains) / EXACT - 1) > 0.06


def test_extrapolation_removes_the_bias_of_the_step():
    problem = StochasticLQR.example()
    policy = extrapolate(lambda dt: without_noise(problem, dt), 0.01, 0.1, AffinePolicy.zero(1, 1))
    assert policy.gain.item() == pytest.approx(EXACT, rel=5e-4)
    sampled = extrapolate(lambda dt: draw(problem, dt, count=1_000_000), 0.02, 0.1, AffinePolicy.zero(1, 1))
    assert sampled.gain.item() == pytest.approx(EXACT, rel=5e-3)


def test_history_follows_policy_iteration_on_the_chain():
    result = lspi(without_noise(StochasticLQR.example(), 0.01), 0.1, AffinePolicy.zero(1, 1))
    gains = [policy.gain.item() for policy in result.history]
    errors = np.abs(np.array(gains) - gains[-1])
    assert 4 <= len(gains) <= 10
    assert errors[0] > errors[1] > errors[2]
    assert errors[3] < 0.1 * errors[2]


def test_two_states_and_two_actions():
    a, b = [[-0.5, 0.4], [0.0, -0.3]], [[1.0, 0.2], [0.0, 1.0]]
    problem = StochasticLQR(a, b, np.eye(2), 0.2 * np.eye(2), 0.2 * np.eye(2), discount=0.1)
    result = lspi(draw(problem, 0.05), 0.1, AffinePolicy.zero(2, 2))
    chain = discretised_gain(a, b, np.eye(2), 0.2 * np.eye(2), 0.2 * np.eye(2), 0.1, 0.05)
    np.testing.assert_allclose(result.policy.gain.numpy(), chain, atol=0.015 * np.abs(chain).max())


def test_shifted_target_gives_an_offset():
    base = without_noise(StochasticLQR.example(), 0.02)
    shifted = Transitions(
        state=base.state + 1.0, action=base.action, reward=base.reward, next_state=base.next_state + 1.0, dt=base.dt
    )
    policy = lspi(shifted, 0.1, AffinePolicy.zero(1, 1)).policy
    chain = discretised_gain(*SCALAR, 0.02).item()
    assert policy.gain.item() == pytest.approx(chain, rel=1e-8)
    assert policy.offset.item() == pytest.approx(chain, rel=1e-8)


def test_actions_that_follow_from_states_are_refused():
    base = draw(StochasticLQR.example(), 0.01, count=100)
    tied = Transitions(
        state=base.state, action=0 * base.state, reward=base.reward, next_state=base.next_state, dt=base.dt
    )
    with pytest.raises(ValueError, match="actions of their own"):
        lspi(tied, 0.1, AffinePolicy.zero(1, 1))


def test_too_few_transitions_have_no_maximum_and_say_so():
    base = draw(StochasticLQR.example(), 0.01, count=400)
    flipped = Transitions(
        state=base.state, action=base.action, reward=-base.reward, next_state=base.next_state, dt=base.dt
    )
    with pytest.raises(ValueError, match="no maximum"):
        lspi(flipped, 0.1, AffinePolicy.zero(1, 1))
    with pytest.raises(ValueError, match="discount rate"):
        lspi(base, 0.0, AffinePolicy.zero(1, 1))
    with pytest.raises(ValueError, match="dt must be positive"):
        draw(StochasticLQR.example(), 0.0, count=2)
