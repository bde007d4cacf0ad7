"""Regression on clean samples: weights, draws, and the closed form of what it finds."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpo import rollout, sample_seeds
from ddpo.control.diffusion.chain import tilted_terminal
from ddpo.control.diffusion.toy_pipeline import toy_schedule
from ddpo.control.diffusion.toy_problem import toy_problem
from ddpo.objectives import Experience, Models
from ddpo.objectives.clean_sample import CleanSampleConfig, sample_weights
from ddpo.objectives.clean_sample_presets import PRESETS
from ddpo.sampling.samplers import SamplerConfig
from ddpo.trajectory import Keep, Samples
from ddpo.validation import FieldError

SAMPLERS = {
    "ddim": SamplerConfig(num_steps=5, guidance_scale=1.0),
    "flow": SamplerConfig(kind="flow_sde", num_steps=5, eta=0.7, guidance_scale=1.0),
}
TEMPERATURE = 0.5


def draw(problem, *, count, seed=0):
    """A pretrained policy, and what it samples with its rewards."""
    policy = problem.policy()
    path = rollout(policy, policy.encode([""] * count), sample_seeds(seed, 0, range(count)), keep=Keep.FINAL)
    scores = problem.score(policy.decode(path.final), [""] * count, [])
    experience = Experience(
        samples=Samples(prompts=("",) * count, metadata=({},) * count, trajectory=path),
        start=0,
        scores=scores,
        groups=torch.arange(count) // 8,
        advantages=torch.zeros(count, path.schedule.num_steps),
        kl_weight=torch.zeros(count),
        penalised=False,
    )
    return policy, experience


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12), st.floats(0.05, 5))
def test_weights_are_exponential_in_the_reward_with_mean_one(values, temperature):
    scores = torch.tensor(values, dtype=torch.float64)
    weights = sample_weights(scores, torch.zeros(len(values), dtype=torch.int64), temperature)
    assert math.isclose(float(weights.mean()), 1.0, rel_tol=1e-9)
    ratio = torch.exp((scores - scores[0]) / temperature)
    torch.testing.assert_close(weights, weights[0] * ratio, rtol=1e-9, atol=1e-9)


def test_weights_of_a_prompt_know_nothing_of_other_prompts():
    scores, groups = torch.tensor([0.0, 1.0, 50.0, 51.0]), torch.tensor([0, 0, 1, 1])
    weights = sample_weights(scores, groups, 1.0)
    torch.testing.assert_close(weights[:2], weights[2:])
    assert float(weights[1] / weights[0]) == pytest.approx(math.e, rel=1e-6)


def test_the_best_fraction_counts_alike_and_the_rest_not_at_all():
    scores, groups = torch.tensor([3.0, 1.0, 2.0, 0.0, 9.0, 7.0, 8.0, 6.0]), torch.arange(8) // 4
    best = sample_weights(scores, groups, 1.0, best_fraction=0.25)
    assert best.tolist() == [4, 0, 0, 0, 4, 0, 0, 0]
    whole = sample_weights(scores, torch.zeros(8, dtype=torch.int64), 1.0, best_fraction=0.5)
    assert whole.tolist() == [0, 0, 0, 0, 2, 2, 2, 2]


def test_a_noise_depends_on_the_pass_the_sample_and_its_slot_alone():
    _, experience = draw(toy_problem(2), count=8)
    objective = CleanSampleConfig(noises=4).build()
    rows, slots = torch.tensor([5, 2, 5, 0]), torch.tensor([1, 3, 2, 1])
    together = objective.gather(experience, rows, slots, seed=7)
    for i in range(4):
        alone = objective.gather(experience, rows[i : i + 1], slots[i : i + 1], seed=7)
        for name in ("steps", "eps", "clean", "weights"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i]), name
    other = objective.gather(experience, rows, slots, seed=8)
    assert (other.eps != together.eps).all()
    assert len({float(x) for x in together.eps[:, 0]}) == 4


def test_the_noises_of_a_sample_share_out_the_steps_evenly():
    _, experience = draw(toy_problem(2, sampler=SAMPLERS["ddim"]), count=512)
    objective = CleanSampleConfig(noises=5).build()
    slots = torch.arange(5).repeat(512)
    batch = objective.gather(experience, torch.arange(512).repeat_interleave(5), slots, seed=0)
    assert torch.equal(batch.steps, slots), "as many noises as steps: one at each"
    single = CleanSampleConfig(noises=1).build().gather(experience, torch.arange(512), torch.zeros(512).long(), seed=0)
    counts = torch.bincount(single.steps, minlength=5)
    assert float((counts - 102.4).abs().max()) < 4.5 * math.sqrt(512 * 0.2 * 0.8)
    assert abs(float(batch.eps.mean())) < 4.5 / math.sqrt(batch.eps.numel())
    assert float(batch.eps.var()) == pytest.approx(1, abs=4.5 * math.sqrt(2 / batch.eps.numel()))


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_loss_is_the_weighted_squared_error_of_the_networks_own_output(name):
    policy, experience = draw(toy_problem(2, sampler=SAMPLERS[name]), count=16)
    objective = CleanSampleConfig(temperature=TEMPERATURE, noises=4).build()
    rows, slots = torch.arange(16), torch.arange(16) % 4
    batch = objective.gather(experience, rows, slots, seed=0)
    (loss,) = objective.losses(Models(policy=policy), batch)
    a, s = policy.schedule.a[batch.steps, None], policy.schedule.s[batch.steps, None]
    x = a * batch.clean + s * batch.eps
    (output,) = policy.denoiser.module(x, policy.schedule.model_time[batch.steps], return_dict=False)
    target = batch.clean if name == "ddim" else batch.eps - batch.clean
    expected = (batch.weights * (output - target).square().mean(1)).mean()
    torch.testing.assert_close(loss.value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_denoiser_of_the_tilted_law_is_where_the_gradient_vanishes_and_the_pretrained_one_is_not(name):
    problem = toy_problem(2, sampler=SAMPLERS[name])
    policy, experience = draw(problem, count=10_000)
    tilted, pretrained = head_of_the_tilted_law(problem), [torch.zeros_like(p) for p in policy.trainable().values()]
    assert largest_z(policy, experience, tilted) < 4.5
    assert largest_z(policy, experience, pretrained) > 20


def head_of_the_tilted_law(problem):
    """Gain (T, d, d) and shift (T, d) with which the toy policy is the posterior mean of the tilted law."""
    schedule = toy_schedule(problem.sampler)[1]
    mean, cov = tilted_terminal(problem.reference, problem.reward, TEMPERATURE)
    eye, gains, shifts = torch.eye(len(mean), dtype=torch.float64), [], []
    for k in range(schedule.num_steps):
        a, s, std = (float(values[k]) for values in (schedule.a, schedule.s, schedule.std))
        scale = std / float(schedule.a_next[k] - schedule.direction[k] * a / s)

        def gain_of(cov, a=a, s=s):
            return a * torch.linalg.solve(a**2 * cov + s**2 * eye, cov)

        target, own = gain_of(cov), gain_of(problem.cov)
        shift = (mean - a * target @ mean) - (problem.mean - a * own @ problem.mean)
        gains.append((target - own) / scale if std > 0 else torch.zeros_like(own))
        shifts.append(shift / scale if std > 0 else torch.zeros_like(shift))
    return torch.stack(gains), torch.stack(shifts)


def largest_z(policy, experience, head, *, chunks=40):
    """Largest |mean gradient| over its standard error, of the head's weights at steps with noise."""
    objective = CleanSampleConfig(temperature=TEMPERATURE, noises=5).build()
    with torch.no_grad():
        for parameter, value in zip(policy.trainable().values(), head, strict=True):
            parameter.copy_(value)
    found = []
    for rows in torch.arange(len(experience.scores)).chunk(chunks):
        each = rows.repeat_interleave(5)
        batch = objective.gather(experience, each, torch.arange(5).repeat(len(rows)), seed=0)
        (loss,) = objective.losses(Models(policy=policy), batch)
        gradients = torch.autograd.grad(loss.value, list(policy.trainable().values()))
        steps = list(policy.schedule.stochastic_steps)
        found.append(torch.cat([gradient[steps].flatten() for gradient in gradients]).double())
    stacked = torch.stack(found)
    return float((stacked.mean(0) / (stacked.std(0) / math.sqrt(chunks))).abs().max())


def test_noisy_times_have_the_density_2t_in_the_share_of_noise():
    _, experience = draw(toy_problem(2, sampler=SAMPLERS["flow"]), count=2000)
    objective = CleanSampleConfig(preset="ram", noises=5).build()
    rows = torch.arange(2000).repeat_interleave(5)
    batch = objective.gather(experience, rows, torch.arange(5).repeat(2000), seed=0)
    t = experience.trajectory.schedule.s.double()
    borders = [1.0, *((t[1:] + t[:-1]) / 2).tolist(), 0.0]
    exact = torch.tensor([above**2 - below**2 for above, below in zip(borders, borders[1:], strict=False)])
    assert float(exact.sum()) == pytest.approx(1) and float(exact[0]) > 0.2
    counts = torch.bincount(batch.steps, minlength=5) / 10_000
    assert float((counts - exact).abs().max()) < 4.5 * math.sqrt(0.25 / 10_000)
    by_slot = batch.steps.view(2000, 5).double().mean(0)
    assert by_slot.tolist() == sorted(by_slot.tolist()), "a sample's noises share out the law among them"


def test_skipped_steps_are_never_drawn_and_the_others_alike():
    _, experience = draw(toy_problem(2, sampler=SAMPLERS["flow"]), count=400)
    objective = CleanSampleConfig(preset="awm", noises=4, skip_steps=1).build()
    batch = objective.gather(experience, torch.arange(400).repeat_interleave(4), torch.arange(4).repeat(400), seed=0)
    assert torch.bincount(batch.steps, minlength=5).tolist() == [0, 400, 400, 400, 400]
    assert objective.demand.least_steps == 2


def test_advantages_are_clipped_and_the_share_of_it_is_reported():
    policy, experience = draw(toy_problem(2), count=8)
    values = torch.tensor([-9.0, -2.0, 0.0, 1.0, 2.0, 4.9, 5.0, 30.0])
    experience = replace(experience, advantages=values[:, None].expand(8, experience.advantages.shape[1]))
    objective = CleanSampleConfig(preset="awm", noises=1).build()
    batch = objective.gather(experience, torch.arange(8), torch.zeros(8).long(), seed=0)
    torch.testing.assert_close(batch.weights, values.clamp(-5, 5))
    old = {name: value.detach() for name, value in policy.trainable().items()}
    (loss,) = objective.losses(Models(policy=policy, old=old), batch)
    assert loss.metrics["advantage_clipped"].tolist() == [1, 0, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("name", SAMPLERS)
def test_distances_to_the_pretrained_and_the_old_policy_are_those_of_the_networks_output(name):
    policy, experience = draw(toy_problem(2, sampler=SAMPLERS[name]), count=6)
    old = {key: torch.full_like(value, 0.3) for key, value in policy.trainable().items()}
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.fill_(0.1)
    objective = CleanSampleConfig(preset="awm", noises=4, skip_steps=0, reference_weight=2.0, old_weight=3.0).build()
    batch = objective.gather(experience, torch.arange(6), torch.arange(6) % 4, seed=0)
    (loss,) = objective.losses(Models(policy=policy, old=old), replace(batch, weights=torch.zeros(6)))
    x = policy.schedule.noised(batch.steps, batch.clean, batch.eps)
    outputs = []
    for value in (0.1, 0.0, 0.3):
        with torch.no_grad():
            for parameter in policy.trainable().values():
                parameter.fill_(value)
            outputs.append(policy.denoiser.module(x, policy.schedule.model_time[batch.steps])[0])
    own, pretrained, before = outputs
    far, near = ((own - other).square().mean(1) for other in (pretrained, before))
    torch.testing.assert_close(loss.metrics["distance_to_reference"], far, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.metrics["distance_to_old"], near, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.value, (2 * far + 3 * near).mean(), rtol=1e-4, atol=1e-6)


def test_a_preset_sets_the_knobs_and_each_of_them_can_be_given():
    nft = CleanSampleConfig(preset="nft")
    assert nft.knobs == PRESETS["nft"]
    other = CleanSampleConfig(preset="nft", multiplier=2.0, anchor="reference", noises=3)
    assert other.knobs == replace(PRESETS["nft"], multiplier=2.0, anchor="reference", noises=3)
    assert [nft.knobs.old_decay(epochs) for epochs in (0, 10, 900)] == [0, 0.01, 0.5]
    demand = nft.build().demand
    assert demand.samples_from_old and demand.frozen_passes == 2 and demand.old_policy(10) == 0.01
    weighted = CleanSampleConfig().build().demand
    assert weighted.old_policy is None and weighted.frozen_passes == 0 and weighted.guidance
    tilt = CleanSampleConfig(preset="tilt_matching").build().demand
    assert not tilt.samples_from_old and tilt.old_policy(5) == 0, "old is the policy at the start of the epoch"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "shifted"}, "target must be sample with worth: exponential"),
        ({"multiplier": 2.0}, "multiplier must be null with worth: exponential"),
        ({"clip": 2.0}, "clip must be null with worth: exponential"),
        ({"old_rate": 0.1}, "old_rate must be null with neither a target with an anchor"),
        ({"anchor": "old"}, "anchor must be null with target: sample"),
        ({"preset": "nft", "temperature": 0.1}, "temperature must be null with worth: advantage"),
        ({"preset": "ram", "compare": "prompt"}, "compare must be null with worth: advantage"),
        ({"preset": "awm", "best_fraction": 0.1}, "best_fraction must be null with worth: advantage"),
        ({"preset": "ram", "target": "contrast"}, "clip must be finite with target: contrast"),
        ({"preset": "ram", "old_limit": 1.0}, r"old_limit must be in \[0, 1\)"),
        ({"preset": "nft", "multiplier": 0.0}, "multiplier must be positive"),
        ({"preset": "awm", "reference_weight": -1.0}, "reference_weight must be at least 0"),
    ],
)
def test_settings_that_nothing_would_read_are_refused(options, message):
    with pytest.raises(FieldError, match=message):
        CleanSampleConfig(**options)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"best_fraction": -0.1}, "best_fraction"),
        ({"noises": 0}, "noises"),
        ({"updates_per_epoch": 0}, "updates_per_epoch"),
    ],
)
def test_an_option_out_of_range_is_refused_with_its_field(options, field):
    with pytest.raises(FieldError, match=f"^{field} must be"):
        CleanSampleConfig(**options)
