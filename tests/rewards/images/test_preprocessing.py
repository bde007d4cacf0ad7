"""Differentiable preprocessing against what open_clip, torchvision and transformers do to PIL pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from rewards.images.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing, encode_uint8, resize

SHAPES = [(96, 96), (80, 120), (150, 64), (301, 211), (40, 40)]
GREY_LEVEL = 1 / 255 / 0.27  # one of 255 levels, in normalised units of CLIP


def picture(height, width, seed=0):
    """Smooth colours, hard edges and noise, as 8-bit values: what photographs have at several scales."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    smooth = np.stack([np.sin(7 * x) * np.cos(5 * y), np.cos(9 * x * y), x - y], axis=-1) * 0.4 + 0.5
    edges = ((x * 11).astype(int) + (y * 7).astype(int)) % 2
    mixed = smooth + 0.3 * (edges[..., None] - 0.5) + 0.1 * rng.standard_normal((height, width, 1))
    return Image.fromarray((mixed.clip(0, 1) * 255).astype(np.uint8))


def tensor(image):
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]


def errors(ours, theirs):
    difference = (ours - theirs).abs()
    return difference.mean().item(), difference.max().item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("fit", "resize_mode"), [("shortest", "shortest"), ("squash", "squash")])
def test_matches_open_clips_transform_of_pil_pictures(shape, fit, resize_mode):
    transform = pytest.importorskip("open_clip.transform")
    theirs = transform.image_transform(64, is_train=False, resize_mode=resize_mode, interpolation="bicubic")
    image = picture(*shape)
    mean, largest = errors(Preprocessing(size=(64, 64), fit=fit)(tensor(image)), theirs(image)[None])
    assert mean < 0.4 * GREY_LEVEL
    assert largest < 1.5 * GREY_LEVEL


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_hpsv2s_longest_side_with_black_bars(shape):
    """HPSv2 resizes the PIL picture so that its longest side fits, then centres it on black, then normalises."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = picture(*shape)
    scale = 64 / max(shape)
    height, width = (round(side * scale) for side in shape)
    canvas = Image.new("RGB", (64, 64))
    canvas.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((64 - width) // 2, (64 - height) // 2))
    theirs = functional.normalize(functional.to_tensor(canvas), CLIP_MEAN, CLIP_STD)
    mean, largest = errors(Preprocessing(size=(64, 64), fit="longest")(tensor(image)), theirs[None])
    assert mean < 0.4 * GREY_LEVEL
    assert largest < 1.5 * GREY_LEVEL


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_image_processors_of_transformers(shape):
    transformers = pytest.importorskip("transformers")
    image = picture(*shape)
    clip = transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    theirs = torch.as_tensor(np.asarray(clip(image)["pixel_values"]))
    assert errors(Preprocessing(size=(64, 64), offset="floor")(tensor(image)), theirs)[0] < 0.4 * GREY_LEVEL
    siglip = transformers.SiglipImageProcessor(size={"height": 64, "width": 64}, resample=3)
    theirs = torch.as_tensor(np.asarray(siglip(image)["pixel_values"]))
    ours = Preprocessing(size=(64, 64), fit="squash", mean=(0.5,) * 3, std=(0.5,) * 3)(tensor(image))
    assert errors(ours, theirs)[0] < 0.4 * GREY_LEVEL


def test_plausible_mistakes_exceed_the_tolerance():
    image = picture(301, 211)
    right = Preprocessing(size=(64, 64))(tensor(image))
    no_antialias = torch.nn.functional.interpolate(tensor(image), size=(91, 64), mode="bicubic").clamp(0, 1)
    wrong = Preprocessing(size=(64, 64))(no_antialias)
    squashed = Preprocessing(size=(64, 64), fit="squash")(tensor(image))
    bilinear = Preprocessing(size=(64, 64), resample="bilinear")(tensor(image))
    for mistake in (wrong, squashed, bilinear):
        assert errors(mistake, right)[0] > 0.5 * GREY_LEVEL


@pytest.mark.parametrize("fit", ["shortest", "longest", "squash"])
def test_gradients_equal_finite_differences(fit):
    """Piecewise linear in the pixels: away from the clamp, central differences are exact."""
    preprocess = Preprocessing(size=(6, 6), fit=fit)
    generator = torch.Generator().manual_seed(0)
    images = (0.4 + 0.2 * torch.rand(1, 3, 11, 9, generator=generator)).requires_grad_()
    weights = torch.randn(1, 3, 6, 6, generator=generator)
    gradient = torch.autograd.grad((preprocess(images) * weights).sum(), images)[0]
    direction = torch.randn(images.shape, generator=generator)
    step = 1e-2
    values = [(preprocess(images.detach() + s * direction) * weights).double().sum() for s in (step, -step)]
    expected = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close((gradient * direction).double().sum(), expected, rtol=1e-3, atol=1e-3)


def test_overshoot_is_clamped_as_in_pil():
    image = tensor(
        Image.fromarray(np.repeat(np.tile([0, 255], 20).astype(np.uint8)[None, :, None], 40, 0).repeat(3, 2))
    )
    enlarged = resize(image, (100, 100))
    assert enlarged.min() == 0
    assert enlarged.max() == 1


def test_images_of_the_right_size_are_only_normalised():
    image = tensor(picture(32, 32))
    expected = (image - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    for fit in ("shortest", "longest", "squash"):
        torch.testing.assert_close(Preprocessing(size=(32, 32), fit=fit)(image), expected)


def test_pictures_survive_the_way_to_uint8():
    image = picture(12, 7)
    assert np.array_equal(encode_uint8(tensor(image))[0].numpy(), np.asarray(image))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": (0, 4)}, "both positive"),
        ({"size": (4, 4), "fit": "stretch"}, "fit must be one of"),
        ({"size": (4, 4), "std": (1.0, 0.0, 1.0)}, "std must be positive"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**fields)
