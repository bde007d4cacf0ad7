"""Whose KL a chain reports, and what it would be if every step had noise."""

from dataclasses import replace

import pytest
import torch

from ddpo import Schedule, full_noise_kl, path_kl, rollout, sample_seeds
from ddpo.control.checks.shared_head import DDIM, DDIM_NOISY, DDIM_PRETRAINED, check_full_noise_kl, window
from ddpo.control.diffusion.gradient_check import draw_paths
from ddpo.control.diffusion.toy_problem import toy_problem
from ddpo.displacement import displacement


def paths_of(sampler=None):
    drawn = draw_paths(toy_problem(sampler=sampler, head="shared"), num_paths=16, chunk_size=16)
    return drawn.policy, drawn.chunks[0]


def test_full_noise_kl_is_its_closed_form_at_the_states_of_a_window() -> None:
    full, seen = list(check_full_noise_kl())
    assert full.passed and seen.passed
    assert float(full.exact) > 3 * float(seen.exact), "the window sees a part of what has moved"


def test_with_noise_in_all_steps_it_is_the_path_kl() -> None:
    policy, path = paths_of()
    assert torch.equal(full_noise_kl(policy, path), path_kl(policy, path))


def test_steps_without_noise_even_then_are_left_out() -> None:
    policy, path = paths_of(window(3))
    kl = full_noise_kl(policy, path)
    assert policy.full_noise.schedule.named_stochastic_steps == "steps 0-8 of 10"
    assert (kl[:, :9] > 0).all() and (kl[:, 9] == 0).all()
    assert (path_kl(policy, path)[0] > 0).tolist() == [k in (3, 4, 5) for k in range(10)]


def test_it_takes_the_states_of_an_ode_too() -> None:
    policy, _ = paths_of()
    path = rollout(policy.noise_free, policy.encode(["", ""]), sample_seeds(0, 0, range(2)))
    assert path_kl(policy, path).eq(0).all()
    assert (full_noise_kl(policy, path)[:, :9] > 0).all()


@pytest.mark.parametrize("sampler", [DDIM, window(3)], ids=["stock end", "window"])
def test_how_far_a_step_that_never_has_noise_has_moved_is_known_from_the_pretrained_chain(sampler) -> None:
    policy, path = paths_of(sampler)
    reference = toy_problem(sampler=sampler, head="shared").reference
    pretrained = path.state(9).double() @ reference.F[9].T + reference.g[9]
    expected = (path.final - pretrained).square().mean(1)
    torch.testing.assert_close(displacement(policy, path).double(), expected, rtol=1e-3, atol=1e-6)
    assert float(expected.min()) > 1e-4


def test_with_noise_or_the_pretrained_weights_in_every_step_none_has_moved() -> None:
    for sampler in (DDIM_NOISY, DDIM_PRETRAINED):
        assert displacement(*paths_of(sampler)).eq(0).all()


@pytest.mark.parametrize(
    ("noisy", "name"),
    [
        ((0, 1, 2, 3), "all 4 steps"),
        ((0, 1, 2), "steps 0-2 of 4"),
        ((0, 2, 3), "steps 0, 2-3 of 4"),
        ((1,), "step 1 of 4"),
        ((), "no step of 4"),
    ],
)
def test_a_chain_names_the_steps_that_its_kl_is_of(noisy, name) -> None:
    ones = torch.ones(4)
    stochastic = torch.tensor([k in noisy for k in range(4)])
    schedule = Schedule(model_time=ones, a=ones, s=ones, a_next=ones, direction=ones, std=ones, stochastic=stochastic)
    assert replace(schedule, std=stochastic.float()).named_stochastic_steps == name
