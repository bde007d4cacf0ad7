"""Steered samples: their seeds, their price, what is refused; and the checks of `ddpo verify` on the exact chain."""

from functools import partial

import pytest
import torch

from ddpo import rollout
from ddpo.control.checks import guidance
from ddpo.control.checks import steering as checks
from ddpo.credit.critic import Critic, CriticShape, pooled_prompt
from ddpo.steered import steered_ends, steered_samples
from ddpo.steering import (
    BestOfN,
    FeynmanKacKind,
    LangevinKind,
    RewardGradientKind,
    Svdd,
    SvddKind,
    ValueKind,
    ValueParticles,
    critic_value,
)
from ddpo.steering.particles import particle_seeds, resample
from ddpo.validation import UserError
from tests.ddpo.families import tiny_sd3, tiny_sdxl
from tests.ddpo.tools import make_policy, perturb

PROMPTS = ["a cat", "two dogs", "red house"]
SEEDS = torch.tensor([3, 14, 15])
KINDS = [
    BestOfN(particles=3),
    FeynmanKacKind(alpha=0.01, particles=3, every=1, threshold=1.0),
    SvddKind(alpha=0.01, candidates=3),
    RewardGradientKind(alpha=1e-3),
    RewardGradientKind(alpha=1e-3, through="image"),
    LangevinKind(alpha=1e-3, corrections=2),
]


def redness(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


@pytest.fixture(scope="module")
def policy():
    policy = make_policy()
    perturb(policy)
    return policy


@pytest.fixture(scope="module")
def plain(policy):
    return steered_samples(policy, PROMPTS, redness, steer=BestOfN(particles=1), seeds=SEEDS)


def test_one_particle_is_the_rollout(policy, plain):
    assert torch.equal(plain.latents, rollout(policy, policy.encode(PROMPTS), SEEDS).final)
    one = steered_samples(policy, PROMPTS, redness, steer=SvddKind(candidates=1), seeds=SEEDS)
    assert torch.equal(one.latents, plain.latents)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_scores_higher_and_does_not_depend_on_the_batch(policy, plain, kind):
    whole = steered_samples(policy, PROMPTS, redness, steer=kind, seeds=SEEDS, batch_size=9)
    parts = [steered_samples(policy, [p], redness, steer=kind, seeds=SEEDS[i : i + 1], batch_size=3)
             for i, p in enumerate(PROMPTS)]  # fmt: skip
    torch.testing.assert_close(whole.latents, torch.cat([part.latents for part in parts]), rtol=1e-3, atol=1e-3)
    if not isinstance(kind, SvddKind):  # which looks at predicted images, and those of a random network foretell little
        assert whole.scores.mean() > plain.scores.mean()


def test_svdd_raises_the_reward_of_the_chain():
    problem = checks.toy_problem(2)
    policy, seeds = problem.policy(), torch.arange(300)
    rewards = []
    for candidates in (1, 6):
        steer = Svdd(score=lambda images, rows: problem.score(images, [], []), alpha=0.3, candidates=candidates)
        with torch.no_grad():
            ends, _ = steered_ends(policy, policy.encode([""] * 300), seeds, steer)
        rewards.append(float(problem.reward(ends.double()).mean()))
    assert rewards[1] > rewards[0] + 0.2


def test_the_cost_is_what_the_docs_say(policy, plain):
    each, steps = plain.cost.network // 3, policy.schedule.num_steps
    for kind, rows, scored in (
        (BestOfN(particles=3), 3 * each, 3),
        (SvddKind(candidates=3), each // steps * (1 + 3 * (steps - 1)), None),
        (RewardGradientKind(through="image"), each, None),
        (RewardGradientKind(), 2 * each, None),
        (LangevinKind(corrections=2), each // steps * (steps + 2 * (steps - 1)), None),
    ):
        cost = steered_samples(policy, PROMPTS[:1], redness, steer=kind, seeds=SEEDS[:1]).cost
        assert cost.network == rows
        assert scored is None or cost.rewards == scored


def test_the_cost_counts_the_network_however_its_forward_is_wrapped(policy, plain, monkeypatch):
    module = policy.denoiser.module
    monkeypatch.setattr(module, "forward", partial(type(module).forward, module))  # as offloading hooks do
    again = steered_samples(policy, PROMPTS, redness, steer=BestOfN(particles=1), seeds=SEEDS)
    assert again.cost.network == plain.cost.network == 3 * 4 * 2


def test_rewards_of_the_pretrained_model_have_gradients_too(policy):
    with policy.reference():
        plain = steered_samples(policy, PROMPTS, redness, steer=BestOfN(particles=1), seeds=SEEDS)
        made = steered_samples(policy, PROMPTS, redness, steer=RewardGradientKind(alpha=1e-3), seeds=SEEDS)
    assert made.scores.mean() > plain.scores.mean()


def test_langevin_corrects_the_ode_and_without_a_reward_takes_the_published_step(policy):
    plain = steered_samples(policy.noise_free, PROMPTS, redness, steer=BestOfN(particles=1), seeds=SEEDS)
    for kind in (LangevinKind(alpha=None), LangevinKind(alpha=None, step=None)):
        made = steered_samples(policy.noise_free, PROMPTS, lambda i, p, m: i.detach()[:, 0].mean((1, 2)), steer=kind,
                               seeds=SEEDS)  # fmt: skip
        assert not torch.allclose(made.latents, plain.latents, atol=1e-3)
        assert torch.isfinite(made.latents).all()


def test_a_value_guides_and_weighs_particles(policy, plain):
    up = ValueKind(value=lambda k, x, condition: x.flatten(1).sum(1), alpha=1.0)
    assert steered_samples(policy, PROMPTS, redness, steer=up, seeds=SEEDS).latents.mean() > plain.latents.mean() + 0.1
    of = FeynmanKacKind(alpha=1.0, particles=3, every=1, threshold=1.0)
    made = steered_samples(policy, PROMPTS, redness, steer=ValueParticles(value=up.value, particles_as=of), seeds=SEEDS)
    assert made.log_z.shape == (3,)
    with pytest.raises(UserError, match=r"one number a row with a gradient by the states, got shape \(\), with a"):
        steered_samples(policy, PROMPTS, redness, steer=ValueKind(value=lambda k, x, c: x.sum()), seeds=SEEDS)


@pytest.mark.parametrize("build", [tiny_sdxl, tiny_sd3])
def test_other_families_are_steered(build):
    policy = make_policy(pipeline=build(), num_steps=3, guidance_scale=3.0, **FAMILY[build])
    for kind in KINDS[:4]:
        made = steered_samples(policy, PROMPTS[:1], redness, steer=kind, seeds=SEEDS[:1])
        assert made.images.shape[:2] == (1, 3)
        assert torch.isfinite(made.scores).all()


FAMILY = {tiny_sdxl: {}, tiny_sd3: {"kind": "flow_sde", "eta": 0.7}}


def test_what_cannot_be_steered_is_refused(policy):
    with pytest.raises(UserError, match="needs a sampler with noise"):
        steered_samples(policy.noise_free, PROMPTS, redness, steer=FeynmanKacKind())
    with pytest.raises(UserError, match="particles must be at most the batch size, 16"):
        steered_samples(policy, PROMPTS, redness, steer=BestOfN(particles=17))
    with pytest.raises(UserError, match="no gradient"):
        steered_samples(policy, PROMPTS, lambda i, p, m: redness(i.detach(), p, m), steer=RewardGradientKind())
    for kind in (SvddKind, FeynmanKacKind, RewardGradientKind, LangevinKind):
        with pytest.raises(UserError, match="alpha must be positive"):
            kind(alpha=0.0)
    with pytest.raises(UserError, match=r"step must be in \(0, 2\) or null"):
        LangevinKind(step=2.0)
    made = steered_samples(policy.noise_free, PROMPTS[:1], redness, steer=BestOfN(particles=2))
    assert torch.isfinite(made.scores).all()


def test_systematic_resampling_keeps_the_number_of_children_within_one():
    log_weights = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).log()
    for u in (0.0, 0.3, 0.99):
        children = resample(log_weights, torch.full((1, 4), u, dtype=torch.float64), "systematic").flatten()
        counts = torch.bincount(children, minlength=4)
        assert ((counts - 4 * log_weights.exp()[0]).abs() < 1).all()


def test_particles_have_seeds_of_their_own():
    seeds = particle_seeds(SEEDS, 4).view(3, 4)
    assert torch.equal(seeds[:, 0], SEEDS)
    assert len(seeds.unique()) == 12


@pytest.mark.parametrize("check", [*checks.CHECKS, *guidance.CHECKS], ids=lambda check: check.name)
def test_the_checks_pass(check):
    for found in check.run():
        assert found.passed, found


@pytest.mark.parametrize("potential", ["max", "add"])
def test_every_potential_has_an_unbiased_estimate(potential):
    problem = checks.toy_problem(2)
    steer = checks.feynman_kac(problem, particles=8, threshold=1.0, potential=potential)
    found, _, _ = checks.run_particles(problem, steer, groups=600)
    z = (found - checks.exact_log_z(problem, 1.0)).exp()
    assert checks.z_score(z, 1.0) < 4


def test_a_critic_steers_by_the_weighted_sum_of_its_heads(policy):
    torch.manual_seed(0)
    condition = policy.encode(PROMPTS)
    critic = critic_of(policy, heads=("red", "blue"))
    torch.nn.init.normal_(critic.leave.weight)
    critic.std.data.fill_(1.0)
    value = critic_value(critic, policy, {"red": 2.0})
    x = torch.randn(3, *policy.latent_shape, requires_grad=True)
    found = value(1, x, condition)
    direct = critic(torch.ones(3, dtype=torch.int64), x, pooled_prompt(condition, 3))[:, 0]
    torch.testing.assert_close(found, 2 * direct)
    steered = steered_samples(policy, PROMPTS, redness, steer=ValueKind(value=value, alpha=0.1, rounds=0), seeds=SEEDS)
    free = steered_samples(policy, PROMPTS, redness, steer=BestOfN(particles=1), seeds=SEEDS)
    assert not torch.equal(steered.latents, free.latents)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 7}, "of another model or chain"),
        ({"state": (4, 4, 8)}, "of another model or chain"),
        ({"prompt_size": 3}, "takes prompts of 3 numbers"),
    ],
)
def test_a_critic_of_another_model_is_refused(policy, change, message):
    critic = critic_of(policy, heads=("red",), **change)
    with pytest.raises(UserError, match=message):
        steer = ValueKind(value=critic_value(critic, policy, {"red": 1.0}), alpha=0.1)
        steered_samples(policy, PROMPTS, redness, steer=steer, seeds=SEEDS)


def test_a_head_that_a_critic_lacks_is_named(policy):
    with pytest.raises(UserError, match="no 'green', only red"):
        critic_value(critic_of(policy, heads=("red",)), policy, {"green": 1.0})


def critic_of(policy, *, heads, **change):
    sizes = {
        "num_steps": policy.schedule.num_steps,
        "state": policy.latent_shape,
        "prompt_size": pooled_prompt(policy.encode(PROMPTS), len(PROMPTS)).shape[1],
    }
    return Critic(CriticShape(heads=heads, width=8, **(sizes | change)))
