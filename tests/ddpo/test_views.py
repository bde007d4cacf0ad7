"""Views of one model: other chains, without guidance, and what the network predicts."""

import pytest
import torch

from ddpo import SamplerConfig, rollout
from ddpo.sampling.schedule import coefficient
from ddpo.validation import UserError
from tests.ddpo.families import tiny_sd3
from tests.ddpo.tools import PROMPTS, counting_calls, make_policy, perturb, prior
from tests.tiny import tiny_stable_diffusion

SEEDS = torch.tensor([11, 12, 13])


@pytest.fixture(scope="module")
def policy():
    made = make_policy(guidance_scale=4.0)
    perturb(made)
    return made


def test_the_conditional_view_is_the_policy_at_guidance_one(policy):
    """Of tiny Stable Diffusion, guidance 1 is one call of the conditional branch as well."""
    x, condition = prior(policy, 3), policy.encode(PROMPTS[:3])
    with torch.no_grad(), counting_calls(policy.denoiser.module) as calls:
        alone = policy.conditional(1, x, condition)
        assert len(calls) == 1
        plain = policy.with_sampler(SamplerConfig(num_steps=4, guidance_scale=1.0, height=16, width=16))
        expected = plain(1, x, plain.encode(PROMPTS[:3]))
        guided = policy(1, x, condition)
    torch.testing.assert_close(alone.mean, expected.mean, rtol=1e-5, atol=1e-5)
    assert torch.equal(policy.conditional.conditional(1, x, condition).mean, alone.mean)
    assert not torch.allclose(guided.mean, alone.mean, atol=1e-6)


def test_guided_samples_are_recorded_under_the_conditional_view_by_the_same_passes(policy):
    condition = policy.encode(PROMPTS[:3])
    with counting_calls(policy.denoiser.module) as calls:
        guided = rollout(policy, condition, SEEDS)
        once = len(calls)
        recorded = rollout(policy, condition, SEEDS, recorded=policy.conditional)
    assert len(calls) == 2 * once
    assert torch.equal(guided.latents, recorded.latents)
    for k in policy.schedule.stochastic_steps:
        with torch.no_grad():
            now = policy.conditional(k, recorded.latents[:, k], condition)
        expected = now.log_prob(recorded.latents[:, k + 1])
        torch.testing.assert_close(recorded.log_probs[:, k], expected, rtol=1e-5, atol=1e-2)
        assert not torch.allclose(recorded.log_probs[:, k], guided.log_probs[:, k], rtol=1e-5, atol=1e-2)


def test_the_noise_free_view_is_the_ode_and_the_policy_stays_as_it_is(policy):
    path = rollout(policy.noise_free, policy.encode(PROMPTS[:3]), SEEDS, with_kl=True)
    assert path.schedule.stochastic_steps == () and path.log_probs.eq(0).all() and path.kl.eq(0).all()
    ode = policy.with_sampler(SamplerConfig(kind="ode", num_steps=4, guidance_scale=4.0, height=16, width=16))
    assert torch.equal(rollout(ode, ode.encode(PROMPTS[:3]), SEEDS).final, path.final)
    assert policy.schedule.stochastic_steps == (0, 1, 2, 3)


def build(kind):
    if kind == "flow":
        return make_policy(pipeline=tiny_sd3(), kind="flow_sde", guidance_scale=3.0)
    return make_policy(pipeline=tiny_stable_diffusion(prediction_type=kind))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_a_prediction_is_of_the_latents_that_were_given_and_turns_back_into_the_networks_output(kind):
    policy = build(kind)
    clean, eps = prior(policy, 3), prior(policy, 3, seed=6)
    k, condition = torch.tensor([0, 2, 3]), policy.encode(PROMPTS[:3])
    x = policy.schedule.noised(k, clean, eps)
    with torch.no_grad():
        outputs = policy.outputs(k, x, condition)
        output = policy.rule.combine(outputs.negative, outputs.positive, policy.sampler.guidance_scale)
        prediction = policy.predict(k, x, condition)
    assert policy.kind == kind
    torch.testing.assert_close(policy.schedule.noised(k, prediction.x0, prediction.eps), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(policy.network_output(k, prediction), output, rtol=1e-4, atol=1e-5)
    assert torch.equal(policy(k, x, condition).mean, policy.distribution(k, prediction).mean)


def test_a_noised_state_has_the_signal_and_noise_levels_of_its_own_step(policy):
    clean, eps = prior(policy, 2), prior(policy, 2, seed=6)
    k = torch.tensor([3, 1])
    noised = policy.schedule.noised(k, clean, eps)
    for row, step in enumerate(k.tolist()):
        a, s = policy.schedule.a[step], policy.schedule.s[step]
        assert torch.equal(noised[row], a * clean[row] + s * eps[row])
    assert coefficient(policy.schedule.a, k, clean).shape == (2, 1, 1, 1)


def test_a_prediction_has_a_gradient_by_the_latents(policy):
    x = prior(policy, 1).requires_grad_()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    condition = policy.encode(PROMPTS[:1])

    def value(x):
        return (policy.predict(1, x, condition).x0 * weights).sum()

    (gradient,) = torch.autograd.grad(value(x), x)
    direction, step = gradient / gradient.norm(), 1e-2
    with torch.no_grad():
        difference = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    torch.testing.assert_close(difference, gradient.norm(), rtol=1e-2, atol=0)


def test_a_view_of_another_chain_takes_a_schedule_alone(policy):
    with pytest.raises(UserError, match="takes a Schedule, as a trajectory's .schedule, got a int"):
        policy.at(3)
