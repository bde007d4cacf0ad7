"""Sharpness, colourfulness, entropy and symmetry against closed forms, scipy, numpy and finite differences."""

import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch

from rewards import resolve
from rewards.builtin.statistics import COLOURFULNESS_MAX

DIFFERENTIABLE = ["sharpness", "colourfulness", "symmetry"]


def score(name, images):
    return resolve(name)(images, [""] * len(images), [{}] * len(images)).total


def grey(values):
    return torch.as_tensor(values, dtype=torch.float32).expand(1, 3, *np.shape(values)).clone()


def checkerboard(size):
    i, j = np.indices((size, size))
    return (i + j) % 2


def numpy_luma(image):
    return np.tensordot([0.299, 0.587, 0.114], image.double().numpy(), axes=1)


def test_sharpness_of_a_checkerboard_a_ramp_and_a_parabola_is_known():
    assert score("sharpness", grey(checkerboard(10))).item() == pytest.approx(16.0, rel=1e-5)  # the largest there is
    ramp = np.arange(16).reshape(1, 16).repeat(16, 0) / 16
    assert score("sharpness", grey(ramp)).item() == pytest.approx(0.0, abs=1e-10)
    assert score("sharpness", grey(ramp**2)).item() == pytest.approx(0.0, abs=1e-10)  # constant second derivative
    line = np.zeros((9, 9))
    line[:, 4] = 1.0  # interior columns 1..7: Laplacian 1 on both sides of the line, -2 on it
    assert score("sharpness", grey(line)).item() == pytest.approx(np.var([0, 0, 1, -2, 1, 0, 0]), rel=1e-5)


def test_sharpness_is_that_of_scipys_laplacian_in_the_interior(images):
    expected = [scipy.ndimage.laplace(numpy_luma(image))[1:-1, 1:-1].var() for image in images]
    assert score("sharpness", images).tolist() == pytest.approx(expected, rel=1e-5)
    with_border = scipy.ndimage.laplace(numpy_luma(images[0])).var()
    assert abs(with_border - expected[0]) > 1e-2  # so the border does matter


def test_sharpness_refuses_images_without_an_interior():
    with pytest.raises(Exception, match="at least 3 x 3 pixels"):
        score("sharpness", torch.rand(1, 3, 2, 8))


def test_colourfulness_of_uniform_colours_is_their_distance_from_grey():
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert score("colourfulness", red).item() == pytest.approx(0.3 * 255 * math.sqrt(1.25), rel=1e-5)
    assert score("colourfulness", grey(np.full((4, 4), 0.3))).item() == pytest.approx(0, abs=1e-4)


def test_colourfulness_reaches_its_stated_maximum_and_never_exceeds_it():
    share = 0.5 * (1 + 0.3 / math.sqrt(1.09))  # mean / spread = 0.3
    count = round(share * 10_000)
    pixels = torch.zeros(3, 10_000)
    pixels[0, :count] = 1  # red
    pixels[1:, count:] = 1  # cyan
    best = score("colourfulness", pixels.view(1, 3, 100, 100)).item()
    assert best == pytest.approx(COLOURFULNESS_MAX, rel=2e-5)
    generator = torch.Generator().manual_seed(0)
    assert score("colourfulness", torch.rand(200, 3, 2, 2, generator=generator).round()).max() <= COLOURFULNESS_MAX


def test_colourfulness_is_the_published_formula(images):
    expected = []
    for r, g, b in images.double().numpy() * 255:
        rg, yb = r - g, 0.5 * (r + g) - b
        expected.append(math.hypot(rg.std(), yb.std()) + 0.3 * math.hypot(rg.mean(), yb.mean()))
    assert score("colourfulness", images).tolist() == pytest.approx(expected, rel=1e-5)


def test_entropy_is_that_of_scipy_and_of_known_histograms(images):
    assert score("entropy", grey(np.full((8, 8), 0.5))).item() == 0
    assert score("entropy", grey(checkerboard(8))).item() == pytest.approx(1.0)
    assert score("entropy", grey(np.arange(256).reshape(16, 16) / 255)).item() == pytest.approx(8.0)
    expected = []
    for image in images:
        counts = np.bincount(np.rint(numpy_luma(image) * 255).astype(int).ravel(), minlength=256)
        expected.append(scipy.stats.entropy(counts, base=2))
    assert score("entropy", images).tolist() == pytest.approx(expected, rel=1e-5)


def test_symmetry_is_one_for_mirrored_images_and_zero_for_opposite_halves(images):
    mirrored = torch.cat([images, images.flip(-1)], dim=-1)
    assert score("symmetry", mirrored).tolist() == [1.0] * 4
    halves = np.concatenate([np.zeros((6, 3)), np.ones((6, 3))], axis=1)
    assert score("symmetry", grey(halves)).item() == 0.0
    assert score("symmetry", grey(halves.T)).item() == 1.0  # upside down does not count
    noise = torch.rand(1, 3, 200, 200, generator=torch.Generator().manual_seed(0))
    assert score("symmetry", noise).item() == pytest.approx(1 - 1 / 3, abs=0.01)  # E|u - v| = 1/3


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_equal_finite_differences(name):
    reward = resolve(name)
    assert reward.differentiable
    pixels = torch.rand(2, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reward.function(x, [""] * 2, [{}] * 2), pixels, eps=1e-6)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_finite_where_there_is_a_kink(name):
    pixels = torch.full((1, 3, 6, 6), 0.5, requires_grad=True)
    resolve(name)(pixels, [""], [{}], gradient=True).total.sum().backward()
    assert pixels.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "entropy"])
def test_scores_are_the_same_alone_and_in_a_batch_and_lie_in_the_range(name, images):
    together = score(name, images)
    alone = torch.cat([score(name, image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    low, high = resolve(name).range
    assert low <= together.min()
    assert together.max() <= high
