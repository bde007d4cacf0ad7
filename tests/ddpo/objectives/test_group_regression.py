"""DGPO: a group's loss has the gradient of a logistic potential, and its noise is the whole group's."""

from dataclasses import replace

import pytest
import torch

from ddpo.control.diffusion.toy_problem import toy_problem
from ddpo.objectives import Models
from ddpo.objectives.clean_sample import CleanSampleConfig
from ddpo.validation import FieldError
from tests.ddpo.objectives.test_clean_sample import SAMPLERS, draw

SIZE = 8


def grouped(name):
    """A pretrained policy, two groups of eight samples with advantages, and one noise of each group."""
    policy, experience = draw(toy_problem(2, sampler=SAMPLERS[name]), count=2 * SIZE)
    advantages = torch.randn(2 * SIZE, generator=torch.Generator().manual_seed(0))
    experience = replace(experience, advantages=advantages[:, None].expand(-1, policy.schedule.num_steps))
    objective = CleanSampleConfig(preset="dgpo", multiplier=3.0).build()
    return policy, objective, objective.gather(experience, torch.tensor([11, 2]), torch.tensor([0, 0]), seed=5)


def test_all_samples_of_a_group_share_a_units_step_and_noise():
    _, objective, batch = grouped("flow")
    assert batch.size == SIZE and len(batch.samples.steps) == 2 * SIZE
    eps, steps = batch.samples.eps.reshape(2, SIZE, -1), batch.samples.steps.reshape(2, SIZE)
    assert bool((eps == eps[:, :1]).all()) and bool((steps == steps[:, :1]).all())
    assert not torch.equal(eps[0, 0], eps[1, 0])
    clean = batch.samples.clean.reshape(2, SIZE, -1)
    assert len({tuple(row) for row in clean.reshape(2 * SIZE, -1).tolist()}) == 2 * SIZE, "each sample once"
    assert objective.demand.whole_groups and objective.demand.frozen_passes == 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_gradient_is_that_of_the_logistic_potential_wherever_the_policy_is(name):
    policy, objective, batch = grouped(name)
    samples, module = batch.samples, policy.denoiser.module
    time, x = (
        policy.schedule.model_time[samples.steps],
        policy.schedule.noised(samples.steps, samples.clean, samples.eps),
    )
    target = samples.clean if name == "ddim" else samples.eps - samples.clean
    pretrained = module(x, time)[0].detach()
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    (loss,) = objective.losses(Models(policy=policy), batch)
    found = torch.autograd.grad(loss.value, list(policy.trainable().values()))
    change = (module(x, time)[0] - target).square().mean(1) - (pretrained - target).square().mean(1)
    gain = (samples.weights * change).reshape(2, SIZE).mean(1)
    potential = torch.nn.functional.softplus(3.0 * gain).mean() / 3.0
    exact = torch.autograd.grad(potential, list(policy.trainable().values()))
    for own, other in zip(found, exact, strict=True):
        assert float(other.norm()) > 1e-3
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)
    weight = loss.metrics["group_weight"].reshape(2, SIZE)
    torch.testing.assert_close(weight[:, 0], torch.sigmoid(3.0 * gain).detach(), rtol=1e-3, atol=1e-4)


def test_what_would_change_the_errors_is_refused():
    for options in ({"normalisation": "relative"}, {"error_of": "clean"}, {"old_weight": 1.0}):
        with pytest.raises(FieldError, match="normalisation must be none, as must error_of be output"):
            CleanSampleConfig(preset="dgpo", **options)
    with pytest.raises(FieldError, match="anchor must be null with target: group"):
        CleanSampleConfig(preset="dgpo", anchor="old")
