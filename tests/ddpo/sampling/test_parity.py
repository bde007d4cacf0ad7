"""Every denoising step equals `DDIMScheduler.step`: see `tests.ddpo.parity`."""

from itertools import product

import pytest
import torch

from tests.ddpo.parity import ETAS, PREDICTIONS, SPACINGS, errors, make_scheduler, policy_step


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_mean_and_std_equal_the_ddim_scheduler(prediction, spacing):
    for alpha_to_one, clip, offset, eta in product((False, True), (False, True), (0, 1), ETAS):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
            scheduler = make_scheduler(prediction, spacing, alpha_to_one, clip=clip, offset=offset)
            mean_error, std_error, _ = errors(scheduler, eta, dtype)
            assert mean_error <= tolerance and std_error <= tolerance, (alpha_to_one, clip, offset, eta, dtype)


@pytest.mark.parametrize("num_steps", [1, 3, 7, 50])
def test_parity_holds_for_numbers_of_steps_that_do_not_divide_the_grid(num_steps):
    for spacing, alpha_to_one in product(SPACINGS, (False, True)):
        scheduler = make_scheduler("epsilon", spacing, alpha_to_one, num_steps=num_steps)
        mean_error, std_error, _ = errors(scheduler, 1.0, torch.float64)
        assert max(mean_error, std_error) <= 1e-12, (spacing, alpha_to_one)


def test_parity_holds_with_zero_terminal_signal_to_noise():
    scheduler = make_scheduler("v_prediction", "trailing", True, rescale_betas_zero_snr=True)
    mean_error, std_error, schedule = errors(scheduler, 1.0, torch.float64)
    assert max(mean_error, std_error) <= 1e-12
    assert schedule.a[0] == 0 or schedule.a[0] < 1e-4


@pytest.mark.parametrize("clip_range", [0.5, 2.0])
def test_parity_holds_for_every_clip_range(clip_range):
    scheduler = make_scheduler("epsilon", "leading", False, clip=True, clip_sample_range=clip_range)
    assert max(errors(scheduler, 1.0, torch.float64)[:2]) <= 1e-12


@pytest.mark.parametrize("eta", ETAS)
def test_deterministic_steps_are_excluded_and_no_log_prob_is_nan(eta):
    for prediction, spacing, alpha_to_one, offset in product(PREDICTIONS, SPACINGS, (False, True), (0, 1)):
        scheduler = make_scheduler(prediction, spacing, alpha_to_one, offset=offset)
        schedule, step = policy_step(scheduler, eta, torch.float32)
        x, output = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
        assert schedule.std[~schedule.stochastic].eq(0).all()
        # A std that is only a rounding error above 0 would pass as stochastic and make absurd log-probabilities.
        assert (schedule.std[schedule.stochastic] > 1e-3 * eta).all()
        for k in schedule.stochastic_steps:
            gaussian = step(k, x, output)
            assert gaussian.log_prob(gaussian.sample(torch.randn_like(x))).isfinite().all()
        if eta == 0:
            assert schedule.stochastic_steps == ()
        elif alpha_to_one and spacing != "leading":
            assert schedule.stochastic_steps == tuple(range(9)), "only the last step ends without noise"


@pytest.mark.parametrize("alpha_to_one", [False, True])
def test_leading_spacing_without_offset_has_a_deterministic_last_step(alpha_to_one):
    schedule, _ = policy_step(make_scheduler("epsilon", "leading", alpha_to_one, offset=0), 1.0, torch.float32)
    assert schedule.stochastic_steps == tuple(range(9))


def test_one_call_may_mix_steps():
    scheduler = make_scheduler("v_prediction", "leading", False)
    _, step = policy_step(scheduler, 1.0, torch.float32)
    x, output = torch.randn(10, 4, 3, 3), torch.randn(10, 4, 3, 3)
    mixed = step(torch.arange(10), x, output)
    for k in range(10):
        alone = step(k, x[k : k + 1], output[k : k + 1])
        assert torch.equal(mixed.mean[k : k + 1], alone.mean)
        assert torch.equal(mixed.std[k].flatten(), alone.std.flatten())
