"""The built-in rewards against PIL and against finite differences."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageStat

from rewards import resolve
from rewards.builtin.jpeg import jpeg_kilobytes

COLOR_REWARDS = ["brightness", "redness", "greenness", "blueness"]


def as_pictures(images):
    """uint8 PIL images, by numpy alone."""
    pixels = np.clip(np.rint(images.double().numpy() * 255), 0, 255).astype(np.uint8)
    return [Image.fromarray(picture) for picture in pixels.transpose(0, 2, 3, 1)]


def test_jpeg_size_is_that_of_pil_at_quality_95_in_thousands_of_bytes(images, prompts, metadata):
    expected = []
    for picture in as_pictures(images):
        buffer = BytesIO()
        picture.save(buffer, format="JPEG", quality=95)
        expected.append(len(buffer.getvalue()) / 1000)
    assert resolve("jpeg_incompressibility")(images, prompts, metadata).total.tolist() == pytest.approx(
        expected, abs=1e-6
    )
    assert resolve("jpeg_compressibility")(images, prompts, metadata).total.tolist() == pytest.approx(
        [-size for size in expected], abs=1e-6
    )


def test_jpeg_prefers_flat_pictures():
    noise, flat = torch.rand(1, 3, 64, 64), torch.full((1, 3, 64, 64), 0.5)
    assert jpeg_kilobytes(flat) < jpeg_kilobytes(noise)


def test_jpeg_size_is_the_same_alone_and_in_a_batch_and_in_half_precision(images):
    alone = torch.cat([jpeg_kilobytes(image[None]) for image in images])
    assert torch.equal(jpeg_kilobytes(images), alone)
    on_grid = (images * 255).round() / 255
    assert torch.equal(jpeg_kilobytes(on_grid.double()), jpeg_kilobytes(on_grid))


def test_brightness_is_the_mean_of_pils_luma(images, prompts, metadata):
    expected = [ImageStat.Stat(picture.convert("L")).mean[0] / 255 for picture in as_pictures(images)]
    scores = resolve("brightness")(images, prompts, metadata).total
    assert scores.tolist() == pytest.approx(expected, abs=1.5 / 255)  # PIL rounds every pixel to uint8


@pytest.mark.parametrize(("name", "channel"), [("redness", 0), ("greenness", 1), ("blueness", 2)])
def test_color_rewards_span_their_range(name, channel):
    pure = torch.zeros(1, 3, 4, 4)
    pure[:, channel] = 1
    pictures = torch.cat([pure, 1 - pure, torch.full_like(pure, 0.3)])
    scores = resolve(name)(pictures, [""] * 3, [{}] * 3).total
    torch.testing.assert_close(scores, torch.tensor([1.0, -1.0, 0.0]))


@pytest.mark.parametrize("name", COLOR_REWARDS)
def test_gradients_equal_finite_differences(name):
    reward = resolve(name)
    assert reward.differentiable
    pixels = torch.rand(2, 3, 4, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reward.function(x, [""] * 2, [{}] * 2), pixels)


@pytest.mark.parametrize("name", COLOR_REWARDS)
def test_differentiable_scores_equal_plain_ones(name, images, prompts, metadata):
    reward = resolve(name)
    pixels = images.clone().requires_grad_()
    scores = reward(pixels, prompts, metadata, gradient=True).total
    assert torch.equal(scores.detach(), reward(images, prompts, metadata).total)
    assert torch.autograd.grad(scores.sum(), pixels)[0].abs().min() > 0
