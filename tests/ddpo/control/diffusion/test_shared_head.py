"""Where all steps share their weights, the gradient is complete with noise in all, and lacks what is known else."""

import pytest
import torch

from ddpo.control.checks.gradient import MAX_BAR, RMS_BAR
from ddpo.control.checks.shared_head import (
    DDIM,
    DDIM_NOISY,
    DDIM_PRETRAINED,
    FLOW_NOISY,
    PLAIN,
    REINFORCE,
    check_exact,
    compared,
    random_window,
    window,
)
from ddpo.control.diffusion.gradient_check import GradientComparison, compare_gradients, draw_paths, length_and_cosine
from ddpo.control.diffusion.toy_heads import SharedHead, step_features
from ddpo.control.diffusion.toy_problem import toy_problem

NUM_PATHS = 16_000


@pytest.fixture(scope="module")
def noise_free_end() -> GradientComparison:
    return compared(DDIM, num_paths=NUM_PATHS, num_weights=4)


def test_the_exact_gradient_over_shared_weights_is_that_of_the_networks_own_steps() -> None:
    for measured in check_exact():
        assert measured.passed, measured


@pytest.mark.parametrize(
    "sampler", [DDIM_NOISY, FLOW_NOISY, DDIM_PRETRAINED], ids=["ddim", "flow_sde", "pretrained end"]
)
def test_the_gradient_is_complete_where_no_trained_weights_act_after_the_last_noise(sampler) -> None:
    found = compared(sampler, num_paths=NUM_PATHS, num_weights=4)
    assert torch.equal(found.visible, found.exact)
    assert found.rms_z < RMS_BAR and found.max_z < MAX_BAR


def test_a_noise_free_last_step_hides_a_part_of_the_gradient(noise_free_end) -> None:
    assert noise_free_end.rms_z > 2 * RMS_BAR
    assert noise_free_end.against_visible().rms_z < RMS_BAR
    assert length_and_cosine(noise_free_end.visible, noise_free_end.exact)[0] < 0.8


def test_what_is_measured_is_short_by_what_is_predicted(noise_free_end) -> None:
    predicted = length_and_cosine(noise_free_end.visible, noise_free_end.exact)
    assert length_and_cosine(noise_free_end.estimate, noise_free_end.exact) == pytest.approx(predicted, abs=0.06)


@pytest.mark.parametrize(
    ("sampler", "epochs"), [(window(3), 1), (random_window(), 2)], ids=["window", "random windows"]
)
def test_windows_hide_more_of_it(sampler, epochs) -> None:
    found = compared(sampler, epochs=epochs, num_paths=NUM_PATHS, num_weights=4)
    assert found.against_visible().rms_z < RMS_BAR
    assert length_and_cosine(found.visible, found.exact)[0] < 0.5


def test_a_head_with_weights_of_its_own_for_every_step_cannot_show_it() -> None:
    """Why the shared head is there: steps without noise do not move with the others' weights."""
    found = compare_gradients(draw_paths(toy_problem(), num_paths=200, chunk_size=100), REINFORCE, PLAIN)
    assert torch.equal(found.visible, found.exact)


def test_a_shared_heads_steps_are_its_features_times_its_weights() -> None:
    head, generator = SharedHead(6, 2), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x, k = torch.randn(5, 2, generator=generator), torch.tensor([0, 1, 3, 5, 5])
    t = torch.tensor([-1.0, -0.6, 0.2, 1.0, 1.0])[:, None]
    each = [x @ gain.T + shift for gain, shift in zip(head.gain, head.shift, strict=True)]
    torch.testing.assert_close(head(x, k), each[0] + t * each[1] + t.square() * each[2])
    assert step_features(6)[[0, -1]].tolist() == [[1, -1, 1], [1, 1, 1]]
