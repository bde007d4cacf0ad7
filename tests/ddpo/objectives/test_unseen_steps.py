"""`noise_free_steps: pathwise`: with the derivative through steps without noise the policy gradient is complete."""

import pytest
import torch

from ddpo.control.checks.gradient import MAX_BAR, RMS_BAR
from ddpo.control.checks.shared_head import COMPLETED, DDIM, DDIM_NOISY, compared, window
from ddpo.control.diffusion.gradient_check import draw_paths, length_and_cosine, make_experience
from ddpo.control.diffusion.toy_problem import toy_problem
from ddpo.credit.advantages import AdvantageConfig
from ddpo.objectives import Models, PolicyGradientConfig
from ddpo.validation import FieldError

ENDS = pytest.mark.parametrize("sampler", [DDIM, window(3)], ids=["noise-free end", "window"])


def drawn(sampler, *, count=6, scale="none"):
    """Paths, their experience, and the models of losses."""
    paths = draw_paths(toy_problem(sampler=sampler, head="shared"), num_paths=count, chunk_size=count)
    advantages = AdvantageConfig(baseline="batch", scale=scale)
    experience, _ = make_experience(paths.chunks[0], paths.scores[0], advantages, paths.problem.alpha)
    models = Models(policy=paths.policy, score=lambda images, *_: paths.problem.score(images, [], []))
    return paths, experience, models


def gradient(models, experience, rows, slots):
    """Of the losses of some units, as the trainer adds them up but for the share, (P,)."""
    objective, weights = COMPLETED.build(), list(models.policy.trainable().values())
    batch = objective.gather(experience, rows, slots, seed=0)
    total = sum(loss.value for loss in objective.losses(models, batch))
    return torch.cat([part.flatten() for part in torch.autograd.grad(total, weights)])


def everything(experience):
    samples, units = len(experience.samples), COMPLETED.build().demand.units(len(experience.decisions))
    return torch.arange(samples).repeat_interleave(units), torch.arange(units).repeat(samples)


@ENDS
def test_the_gradient_is_the_whole_one(sampler):
    found = compared(sampler, COMPLETED, num_paths=6_000, num_weights=2)
    assert found.rms_z < 1.6 and found.max_z < MAX_BAR
    assert length_and_cosine(found.estimate, found.exact) == pytest.approx((1, 1), abs=0.06)
    assert found.against_visible().rms_z > 3 * RMS_BAR, "and not that of the steps with noise"


@ENDS
def test_a_chain_moves_with_the_weights_of_its_steps_without_noise_alone(sampler):
    """Central differences of r(x_T) - alpha sum KL_k at fixed noise, with the weights moved in those steps only."""
    paths, experience, models = drawn(sampler, count=3)
    policy, path, alpha = paths.policy, paths.chunks[0], paths.problem.alpha
    schedule, units = path.schedule, len(experience.decisions)
    rows = torch.arange(3)
    found = -gradient(models, experience, rows, torch.full_like(rows, units)) * units / (units + 1) * 3 * 4

    def worth(move):
        x, noise, kl = path.state(0), policy.noise(path.seeds), 0.0
        for k in range(schedule.num_steps):
            for weight, step in zip(policy.trainable().values(), move, strict=True):
                weight += step if k in schedule.unseen_steps else 0
            own = policy(k, x, path.condition)
            with policy.reference():
                stock = policy(k, x, path.condition)
            for weight, step in zip(policy.trainable().values(), move, strict=True):
                weight -= step if k in schedule.unseen_steps else 0
            noisy = k in schedule.stochastic_steps
            kl = kl + own.kl(stock).double() if noisy else kl
            x = own.mean + (schedule.std[k] * noise[:, k + 1] if noisy else 0)
        return float((models.score(policy.decode(x), (), ()).double() - alpha * kl).sum())

    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _ in range(3):
            direction = [torch.randn(weight.shape, generator=generator) for weight in policy.trainable().values()]
            ends = [worth([sign * 1e-2 * each for each in direction]) for sign in (1, -1)]
            slope = float(torch.cat([each.flatten() for each in direction]) @ found)
            assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(slope, rel=5e-3)


def test_micro_batches_add_up_to_the_update():
    _, experience, models = drawn(DDIM)
    rows, slots = everything(experience)
    whole = gradient(models, experience, rows, slots)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    parts = [gradient(models, experience, rows[own], slots[own]) * len(own) for own in order.split(7)]
    torch.testing.assert_close(sum(parts) / len(rows), whole, rtol=1e-4, atol=1e-6)


def test_the_derivative_is_divided_by_what_the_advantages_are_divided_by():
    paths, plain, models = drawn(DDIM)
    _, divided, _ = drawn(DDIM, scale="batch_std")
    std = float(paths.scores[0].double().std(correction=0))
    rows, slots = everything(plain)
    expected = gradient(models, plain, rows, slots) / std
    torch.testing.assert_close(gradient(models, divided, rows, slots), expected, rtol=1e-4, atol=1e-6)
    assert std != pytest.approx(1, abs=0.05)


def test_chains_are_what_was_sampled_before_the_first_update():
    _, experience, models = drawn(window(3))
    objective = COMPLETED.build()
    batch = objective.gather(experience, *everything(experience), seed=0)
    *_, chains = objective.losses(models, batch)
    assert chains.drift is not None and float(chains.drift.max()) < 1e-10
    assert chains.steps is not None and set(chains.steps.tolist()) == {0}, "the first step without noise"


def test_other_gradients_are_not_completed():
    for options in ({"step_weight": "noise_level"}, {"train_guidance": "none"}):
        with pytest.raises(FieldError, match="noise_free_steps must be ignored with another step_weight than none, or"):
            PolicyGradientConfig(noise_free_steps="pathwise", **options)


def test_steps_that_have_noise_or_are_pretrained_are_not_unseen():
    assert toy_problem(sampler=DDIM_NOISY).schedule.unseen_steps == ()
    assert toy_problem(sampler=DDIM).schedule.unseen_steps == (9,)
    assert toy_problem(sampler=window(3)).schedule.unseen_steps == (0, 1, 2, 6, 7, 8, 9)
