"""Which steps of an epoch are stochastic, and what the others then are."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import assume, given
from hypothesis import strategies as st

from ddpo import Policy, SamplerConfig, path_kl, rollout, sample_seeds
from ddpo.pipeline.scheduler import noise_grid
from ddpo.sampling.samplers import epoch_schedule, make_schedule
from ddpo.sampling.step_selection import StepSelection, select_steps
from ddpo.validation import FieldError
from tests.tiny import tiny_stable_diffusion

SELECTIONS = st.one_of(
    st.builds(StepSelection, high_noise_fraction=st.floats(0.01, 1)),
    st.builds(
        StepSelection,
        kind=st.just("window"),
        size=st.integers(1, 6),
        start=st.integers(0, 5),
        stride=st.integers(1, 4),
        shift_every_epochs=st.integers(1, 9),
        restart=st.sampled_from([None, True, False]),
        high_noise_fraction=st.floats(0.3, 1),
    ),
    st.builds(
        StepSelection,
        kind=st.sampled_from(["random_window", "random"]),
        size=st.integers(1, 6),
        high_noise_fraction=st.floats(0.3, 1),
    ),
)


@given(config=SELECTIONS, num_steps=st.integers(2, 40), epoch=st.integers(0, 500), seed=st.integers(0, 2**40))
def test_every_epoch_has_the_same_number_of_noisy_steps_among_the_candidates(config, num_steps, epoch, seed):
    noisy = range(num_steps - 1)
    candidates = config.candidates(noisy, num_steps)
    try:
        size = config.count(candidates)
    except FieldError:
        assume(False)
    steps = select_steps(config, noisy, num_steps=num_steps, epoch=epoch, seed=seed)
    assert len(steps) == size
    assert list(steps) == sorted(set(steps))
    assert set(steps) <= set(candidates)
    if config.kind in ("window", "random_window"):
        assert steps == tuple(range(steps[0], steps[0] + size))


@given(places=st.integers(1, 12), start=st.integers(0, 4), stride=st.integers(1, 5), every=st.integers(1, 3))
def test_a_window_that_starts_again_visits_the_places_of_one_that_stays_in_turn(places, start, stride, every):
    assume(start < places)
    noisy = range(places + 1)
    stays = StepSelection(kind="window", size=2, start=start, stride=stride, shift_every_epochs=every)
    turns = StepSelection(kind="window", size=2, start=start, stride=stride, shift_every_epochs=every, restart=True)

    def visited(config, epochs):
        return [select_steps(config, noisy, num_steps=99, epoch=epoch, seed=0) for epoch in epochs]

    once = list(dict.fromkeys(visited(stays, range(40))))
    assert once[0] == (start, start + 1) and once[-1] == (places - 1, places)
    period = len(once) * every
    assert visited(turns, range(period)) == [place for place in once for _ in range(every)]
    assert visited(turns, range(period, 3 * period)) == 2 * visited(turns, range(period))


def test_the_window_moves_as_in_mixgrpo():
    """MixGRPO, algorithm 1: the left end l starts at 0 and becomes min(l + s, T - w) after every tau iterations."""
    config = StepSelection(kind="window")
    w, s, tau, noisy = 4, 1, 25, range(24)
    left = 0
    for epoch in range(600):
        if epoch > 0 and epoch % tau == 0:
            left = min(left + s, len(noisy) - w)
        assert select_steps(config, noisy, num_steps=25, epoch=epoch, seed=7) == tuple(range(left, left + w))
    assert left == 20


def test_a_window_that_never_moves_stays_where_it_starts():
    config = StepSelection(kind="window", size=3, start=2, shift_every_epochs=0)
    assert not config.changes
    assert {select_steps(config, range(9), num_steps=10, epoch=e, seed=e) for e in (0, 1, 999)} == {(2, 3, 4)}


def test_flow_grpo_fasts_window_visits_every_place_of_its_range_equally_often():
    """Their sde_window_size 2 in sde_window_range (0, T // 2): the left end is uniform on 0 .. T/2 - 2."""
    config = StepSelection(kind="random_window", high_noise_fraction=0.5)
    lefts = [select_steps(config, range(9), num_steps=10, epoch=epoch, seed=3)[0] for epoch in range(4000)]
    counts = torch.bincount(torch.tensor(lefts), minlength=4)
    assert len(counts) == 4
    chi_squared = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_squared < 16.3, counts  # 99.9% quantile with 3 degrees of freedom


def test_random_steps_are_a_uniform_subset():
    config = StepSelection(kind="random", size=3)
    counts = torch.zeros(9)
    for epoch in range(3000):
        counts[list(select_steps(config, range(9), num_steps=10, epoch=epoch, seed=0))] += 1
    assert bool(((counts - 1000).abs() < 120).all()), counts  # binomial(3000, 1/3) has a std of 26


def test_the_choice_is_the_same_in_every_process_and_every_run():
    """Written down once: a resumed run must find them again, whatever was drawn before."""

    def drawn(kind, size, seed=11):
        config = StepSelection(kind=kind, size=size)
        return [select_steps(config, range(20), num_steps=20, epoch=e, seed=seed) for e in (4, 3, 2, 1, 0)][::-1]

    assert drawn("random", 3) == [(4, 11, 19), (11, 13, 14), (2, 12, 13), (2, 9, 14), (7, 8, 9)]
    assert drawn("random_window", 2) == [(1, 2), (11, 12), (1, 2), (5, 6), (13, 14)]
    assert drawn("random", 3) != drawn("random", 3, seed=12)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"size": 3}, r"size must be null with kind: all \(it has every step; choose kind: window, .*got 3"),
        ({"kind": "window", "size": 0}, "size must be at least 1 or null, got 0"),
        ({"kind": "random", "stride": 2}, r"stride must be null with kind: random \(only a window has one\), got 2"),
        ({"kind": "window", "stride": 0}, "stride must be at least 1 or null, got 0"),
        ({"kind": "window", "start": -1}, "start must be at least 0 or null, got -1"),
        ({"kind": "window", "shift_every_epochs": -1}, "shift_every_epochs must be at least 0 or null, got -1"),
        ({"high_noise_fraction": 0.0}, r"high_noise_fraction must be in \(0, 1\], got 0.0"),
        ({"high_noise_fraction": 1.1}, r"high_noise_fraction must be in \(0, 1\], got 1.1"),
    ],
)
def test_keys_out_of_range_or_out_of_place_are_refused(selection, message):
    with pytest.raises(FieldError, match=message):
        StepSelection(**selection)


@pytest.mark.parametrize(
    ("sampler", "selection", "message"),
    [
        ({}, {"kind": "random", "size": 11}, r"stochastic_steps.size must be at most 10, .*of num_steps 10\), got 11"),
        ({"kind": "flow_sde"}, {"kind": "random", "size": 10}, "stochastic_steps.size must be at most 9, .*got 10"),
        ({}, {"kind": "window", "high_noise_fraction": 0.3}, "stochastic_steps.size must be at most 3, .*got 4"),
        ({}, {"kind": "window", "start": 7}, "stochastic_steps.start must be at most 6 with size 4 .*got 7"),
    ],
)  # fmt: skip
def test_more_steps_than_there_are_is_refused_when_the_sampler_is_configured(sampler, selection, message):
    with pytest.raises(FieldError, match=message):
        SamplerConfig(num_steps=10, stochastic_steps=StepSelection(**selection), **sampler)


def test_a_last_step_that_turns_out_to_have_no_noise_is_refused_with_the_steps_that_have():
    scheduler = DDIMScheduler(set_alpha_to_one=True)
    scheduler.set_timesteps(4)
    config = SamplerConfig(num_steps=4, stochastic_steps=StepSelection(kind="window", size=4))
    noisy, ode = vp_pair(config, scheduler)
    with pytest.raises(
        ValueError, match=r"sampler.stochastic_steps.size must be at most 3.* \(steps 0 to 2 have noise"
    ):
        epoch_schedule(noisy, ode, config.stochastic_steps, epoch=0, seed=0)


def vp_pair(config, scheduler):
    grid = noise_grid(scheduler)
    kinds = (config, SamplerConfig(kind="ode", num_steps=config.num_steps))
    return [make_schedule(c, grid, model_time=scheduler.timesteps, is_flow=False, clip=None) for c in kinds]


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
def test_steps_that_are_not_selected_are_euler_steps_of_the_flow(kind):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    sigmas = scheduler.sigmas.double()
    grid = noise_grid(scheduler)
    noisy, ode = (
        make_schedule(
            SamplerConfig(kind=k, num_steps=8, eta=0.7),
            grid,
            model_time=scheduler.timesteps,
            is_flow=True,
            clip=None,
        )
        for k in (kind, "ode")
    )
    selection = StepSelection(kind="window", size=3, start=1, shift_every_epochs=0)
    schedule = epoch_schedule(noisy, ode, selection, epoch=0, seed=0)
    assert schedule.stochastic_steps == (1, 2, 3)
    x, velocity = torch.randn(2, 5, dtype=torch.float64)
    for k in range(8):
        mean = schedule.a_next[k] * (x - sigmas[k] * velocity) + schedule.direction[k] * (
            x + (1 - sigmas[k]) * velocity
        )
        if k in (1, 2, 3):
            assert schedule.std[k] == noisy.std[k] > 0
            assert schedule.direction[k] == noisy.direction[k]
        else:
            assert schedule.std[k] == 0
            torch.testing.assert_close(mean, x + velocity * (sigmas[k + 1] - sigmas[k]), rtol=1e-6, atol=1e-6)


# ---- the policy ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy():
    selection = StepSelection(kind="window", size=2, shift_every_epochs=1)
    sampler = SamplerConfig(num_steps=5, guidance_scale=3.0, stochastic_steps=selection)
    return Policy(tiny_stable_diffusion(), sampler=sampler)


def test_log_prob_noise_and_kl_are_those_of_the_selected_steps_alone(policy):
    condition, seeds = policy.encode(["a", "b"]), sample_seeds(0, 0, range(2))
    for epoch, expected in ((0, (0, 1)), (1, (1, 2)), (2, (2, 3)), (9, (3, 4))):
        path = rollout(policy.at(policy.schedule_of(epoch, seed=0)), condition, seeds, with_kl=True)
        assert path.schedule.stochastic_steps == expected
        assert torch.equal(path.log_probs != 0, path.schedule.stochastic.expand(2, -1))
        assert torch.equal(path_kl(policy, path) != 0, torch.zeros(2, 5, dtype=torch.bool))  # nothing is trained yet
        for k in range(5):
            ode = policy.noise_free(k, path.latents[:, k], condition).mean
            assert torch.equal(path.latents[:, k + 1], ode) == (k not in expected)


def test_on_the_schedule_of_the_data_a_policy_gives_the_log_probabilities_that_were_sampled(policy):
    """Data of epoch 2 replayed later: on the policy's own window, steps 0 and 1, they have another density or none."""
    path = rollout(policy.at(policy.schedule_of(2, seed=0)), policy.encode(["a", "b"]), sample_seeds(0, 2, range(2)))
    for k in path.schedule.stochastic_steps:
        with torch.no_grad():
            then = policy.at(path.schedule)(k, path.latents[:, k], path.condition)
            now = policy(k, path.latents[:, k], path.condition)
        assert torch.equal(then.log_prob(path.latents[:, k + 1]), path.log_probs[:, k])
        assert now.std.eq(0).all()


def test_only_stochastic_steps_pass_through_the_reference(policy, monkeypatch):
    """KL of a window of 2 of 5 steps: 2 calls of the pretrained network, not 5."""
    calls = []
    branches = policy.denoiser.branches
    monkeypatch.setattr(policy.denoiser, "branches", lambda *a: calls.append(a[1]) or branches(*a))
    rollout(policy, policy.encode(["a"]), sample_seeds(0, 0, range(1)), with_kl=True)
    assert len(calls) == 5 + 2


def test_a_policy_with_another_sampler_shares_the_weights_and_gives_the_images_of_one_made_for_it(policy):
    other = SamplerConfig(kind="ode", num_steps=3, guidance_scale=1.0, height=16, width=16)
    seeds = sample_seeds(0, 0, range(2))
    view = policy.with_sampler(other)
    fresh = Policy(tiny_stable_diffusion(), sampler=other)
    images = [p.decode(rollout(p, p.encode(["a", "b"]), seeds).final) for p in (view, fresh)]
    assert images[0].shape == (2, 3, 16, 16)
    assert torch.equal(*images)
    assert view.denoiser.module is policy.denoiser.module
    before = rollout(policy, policy.encode(["a", "b"]), seeds).final
    assert policy.decode(before).shape == (2, 3, 32, 32), "the first policy is as it was"


def test_another_sampler_may_have_fewer_steps_than_training_selects():
    """The configuration of one sampler with the other's selection would be refused, and is never made."""
    selection = StepSelection(kind="random", size=8)
    policy = Policy(tiny_stable_diffusion(), sampler=SamplerConfig(num_steps=12, stochastic_steps=selection))
    view = policy.with_sampler(SamplerConfig(num_steps=4))
    assert view.schedule.num_steps == 4 and len(view.schedule.stochastic_steps) == 4
    assert len(policy.schedule.stochastic_steps) == 8


def test_the_window_of_a_later_epoch_is_another_view_and_leaves_the_first_as_it_is(policy):
    later = policy.at(policy.schedule_of(2, seed=0))
    assert later.schedule.stochastic_steps == (2, 3)
    assert policy.schedule.stochastic_steps == later.with_sampler(policy.sampler).schedule.stochastic_steps == (0, 1)
