"""The JPEG size with a gradient, and rewards that take the gradient of another."""

import pytest
import torch
from PIL import Image
from scipy.fft import dctn

from rewards import resolve
from rewards.builtin.jpeg import jpeg_kilobytes
from rewards.builtin.jpeg_estimate import CHROMINANCE, LUMINANCE, cosines, estimated_kilobytes, quantisation
from scripts.jpeg_estimate import drawn_pictures, report


def test_the_transform_and_the_tables_are_those_of_the_codec(tmp_path):
    block = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(dctn(block.numpy(), norm="ortho"))
    torch.testing.assert_close(cosines() @ block @ cosines().T, expected, atol=1e-5, rtol=1e-5)
    Image.new("RGB", (16, 16)).save(tmp_path / "x.jpg", quality=95)
    written = Image.open(tmp_path / "x.jpg").quantization
    for number, table in enumerate((LUMINANCE, CHROMINANCE)):
        assert sorted(written[number]) == sorted(quantisation(table).int().flatten().tolist())


def test_the_estimate_ranks_pictures_as_their_files_do():
    text = report(drawn_pictures(200))
    assert float(text.partition("rank correlation ")[2].partition(",")[0]) > 0.98
    assert 0.9 < float(text.partition("estimate over size ")[2].partition(" ")[0]) < 1.1


def test_steps_along_the_gradient_make_the_file_smaller():
    images = torch.stack(drawn_pictures(8)[1::2]).requires_grad_()
    before = jpeg_kilobytes(images)
    for _ in range(5):
        (gradient,) = torch.autograd.grad(estimated_kilobytes(images).sum(), images)
        step = gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
        images = (images - 0.3 * step).clamp(0, 1).detach().requires_grad_()
    assert (jpeg_kilobytes(images) < before - 0.02).all()


def test_any_size_of_picture_is_taken():
    assert float(estimated_kilobytes(torch.rand(1, 3, 33, 50))) > 1


def test_a_reward_with_the_gradient_of_another_scores_as_it_does_itself():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    options = {"score": "jpeg_compressibility", "gradient": "jpeg_estimate"}
    reward, prompts, metadata = resolve("straight_through", options=options), ["a", "b"], [{}, {}]
    scores = reward(images, prompts, metadata, gradient=True)
    torch.testing.assert_close(scores.total.detach(), resolve("jpeg_compressibility")(images, prompts, metadata).total)
    (ours,) = torch.autograd.grad(scores.total.sum(), images)
    (expected,) = torch.autograd.grad(-estimated_kilobytes(images).sum(), images)
    torch.testing.assert_close(ours, expected)


def test_a_gradient_is_not_taken_from_a_reward_without_one():
    with pytest.raises(ValueError, match="gradient must be a differentiable reward, got 'jpeg_compressibility'"):
        resolve("straight_through", options={"score": "shapes", "gradient": "jpeg_compressibility"})
