"""Ratios, masks and weights of steps against their definitions, and against the moments that the noise gives them."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ddpo.control.diffusion.toy_pipeline import toy_schedule
from ddpo.objectives.policy_gradient import PolicyGradientConfig, noise_weights
from ddpo.objectives.surrogates import centred_log_ratio, masked_loss
from ddpo.sampling.gaussian import Gaussian
from ddpo.sampling.samplers import SamplerConfig
from tests.ddpo.objectives.test_objective import Chain, draw_experience, everything, gradient, losses

COUNT, DIMS = 200_000, 6


@pytest.mark.parametrize("std", [0.05, 0.7])
def test_the_guarded_ratio_has_mean_one_and_the_same_spread_in_latent_units_at_every_step(std):
    """Under what sampled, log rho' has the mean 0 and the standard deviation |dmu| / D; log rho has neither."""
    generator = torch.Generator().manual_seed(0)
    old_mean, move = (torch.randn(DIMS, generator=generator, dtype=torch.float64) for _ in range(2))
    old = Gaussian(mean=old_mean.expand(COUNT, -1), std=torch.tensor(std).double())
    new = Gaussian(mean=old.mean + 0.1 * move, std=old.std)
    x = old.sample(torch.randn(COUNT, DIMS, generator=generator, dtype=torch.float64))
    plain = new.log_prob(x) - old.log_prob(x)
    guarded = std * centred_log_ratio(new, x, old.mean) / DIMS
    nats = float((0.1 * move).square().sum()) / (2 * std**2)
    torch.testing.assert_close(guarded, std * (plain + nats) / DIMS)
    spread = 0.1 * float(move.norm()) / DIMS
    assert abs(float(guarded.mean())) < 4.5 * spread / math.sqrt(COUNT)
    assert math.isclose(float(guarded.std()), spread, rel_tol=0.01)
    assert math.isclose(float(plain.mean()), -nats, rel_tol=0.02)


@given(st.floats(-2, 2), st.floats(-3, 3), st.floats(0, 1), st.floats(0.01, 1), st.sampled_from([1.0, 0.01]))
def test_the_mask_drops_what_would_leave_the_trust_region_and_nothing_else(log_ratio, advantage, nats, bound, power):
    value = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    loss, dropped = masked_loss(
        value,
        torch.tensor([advantage], dtype=torch.float64),
        power=power,
        bound=bound,
        divergence=torch.tensor([nats], dtype=torch.float64),
    )
    loss.sum().backward()
    ratio = math.exp(power * log_ratio)
    assume(ratio != 1 or log_ratio == 0)  # a logarithm that rounds to none
    outward = (ratio > 1 and advantage > 0) or (ratio < 1 and advantage < 0)
    assume(advantage * log_ratio != 0 or not outward)
    held = outward and nats >= bound
    assert bool(dropped) == held
    assert math.isclose(float(loss.detach()), 0.0 if held else -advantage * ratio / power, rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(float(value.grad), 0.0 if held else -advantage * ratio, rel_tol=1e-9, abs_tol=1e-12)


def test_the_divergence_of_the_mask_is_the_kl_of_what_sampled_to_what_is_trained():
    chain = Chain(3)
    sample = draw_experience(chain)
    with torch.no_grad():
        chain.shift.add_(torch.tensor([0.1, -0.2, 0.3]))
    rows, steps = everything(sample)
    (loss,) = losses(chain, PolicyGradientConfig(ratio="joint", mask="kl"), sample, rows, steps)
    dims = sample.trajectory.final.shape[1]
    expected = dims * torch.tensor([0.1, -0.2, 0.3]).double().square()[steps] / (2 * chain.std[steps] ** 2)
    torch.testing.assert_close(loss.metrics["old_kl_nats"], expected)


def test_weights_of_steps_multiply_each_steps_part_of_the_gradient_with_its_kl():
    chain = Chain(4)
    sample = draw_experience(chain)
    schedule = sample.trajectory.schedule
    schedule.std, schedule.stochastic = chain.std, torch.ones(4, dtype=torch.bool)
    plain, weighted = (
        gradient(chain, PolicyGradientConfig(step_weight=weight), sample).reshape(2, 4)
        for weight in ("none", "noise_level")
    )
    torch.testing.assert_close(weighted, plain * chain.std / chain.std.mean())


def test_weights_have_the_mean_one_over_the_noisy_steps_alone():
    schedule = toy_schedule(SamplerConfig(kind="flow_sde", num_steps=6, eta=0.7))[1]
    steps = torch.tensor(schedule.stochastic_steps)
    assert len(steps) == 5, "the last has no noise"
    weights = noise_weights(schedule, steps)
    assert math.isclose(float(weights.mean()), 1.0, rel_tol=1e-6)
    torch.testing.assert_close(weights / weights[0], schedule.std[steps] / schedule.std[0])
