"""clip_score, aesthetic and hpsv2 on tiny models of the very same classes, against open_clip's own pipeline on PIL."""

import hashlib
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rewards import resolve
from rewards.images.preprocessing import encode_uint8
from rewards.models import weights
from rewards.tools.selftest import check
from tests.rewards import tiny_open_clip as tiny

open_clip = pytest.importorskip("open_clip")

PROMPTS = ["a red circle", "a blue square", "two crosses", "a green triangle"]
CLOSE = 5e-3  # of a cosine: what PIL's 8-bit rounding can change


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return tiny.write_tiny_clip(folder), folder


@pytest.fixture(scope="module")
def pictures():
    """8-bit pictures of 40 x 50, so that PIL and tensors start from the same values."""
    coarse = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(3))
    smooth = torch.nn.functional.interpolate(coarse, size=(40, 50), mode="bilinear")
    return (smooth * 255).round() / 255


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """LAION's layout: places 0, 2, 4, 6, 7 under `layers`."""
    generator = torch.Generator().manual_seed(1)
    sizes, places = [24, 1024, 128, 64, 16, 1], [0, 2, 4, 6, 7]
    tensors = {}
    for place, (inputs, outputs) in zip(places, zip(sizes, sizes[1:], strict=False), strict=True):
        tensors[f"layers.{place}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        tensors[f"layers.{place}.bias"] = torch.randn(outputs, generator=generator)
    path = tmp_path_factory.mktemp("head") / "head.pth"
    torch.save(tensors, path)
    return tensors, path


def pil(pictures):
    return [Image.fromarray(picture) for picture in encode_uint8(pictures).numpy()]


def embeddings_by_open_clip(network, pictures, *, resize_mode="shortest"):
    transform = open_clip.image_transform(32, is_train=False, resize_mode=resize_mode, interpolation="bicubic")
    with torch.no_grad():
        image = network.encode_image(torch.stack([transform(picture) for picture in pil(pictures)]))
        text = network.encode_text(open_clip.get_tokenizer(tiny.NAME)(PROMPTS))
    return image.double().numpy(), text.double().numpy()


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def options(name, folder, head):
    named = {"model": tiny.NAME, "pretrained": str(folder / "weights.pt")}
    return {
        "clip_score": named,
        "aesthetic": named | {"head": str(head[1])},
        "hpsv2": {"model": tiny.NAME, "path": str(folder / "wrapped.pt")},
    }[name]


def make(name, folder, head):
    return resolve(name, options=options(name, folder, head))


# ------------------------------------------------------------------------------------------------------- the formulas


def test_clip_score_is_the_cosine_by_open_clips_own_pipeline(clip, pictures, head):
    network, folder = clip
    image, text = embeddings_by_open_clip(network, pictures)
    scores = make("clip_score", folder, head)(pictures, PROMPTS, [{}] * 4).total
    np.testing.assert_allclose(scores.numpy(), (unit(image) * unit(text)).sum(1), atol=CLOSE)
    wrong_pairs = (unit(image) * np.roll(unit(text), 1, axis=0)).sum(1)
    assert np.abs(wrong_pairs - scores.numpy()).max() > 5 * CLOSE


def test_aesthetic_is_the_linear_head_on_the_unit_embedding(clip, pictures, head):
    network, folder = clip
    x = unit(embeddings_by_open_clip(network, pictures)[0])
    unnormalised = embeddings_by_open_clip(network, pictures)[0]
    for place in (0, 2, 4, 6, 7):
        weight, bias = (head[0][f"layers.{place}.{kind}"].double().numpy() for kind in ("weight", "bias"))
        x, unnormalised = x @ weight.T + bias, unnormalised @ weight.T + bias
    scores = make("aesthetic", folder, head)(pictures, PROMPTS, [{}] * 4).total.numpy()
    np.testing.assert_allclose(scores, x[:, 0], atol=0.003)
    assert np.ptp(x[:, 0]) > 0.03
    assert np.abs(scores - unnormalised[:, 0]).max() > 20 * CLOSE


def test_hpsv2_pads_to_a_square_and_returns_the_cosine(clip, pictures, head):
    network, folder = clip
    image, text = embeddings_by_open_clip(network, pictures, resize_mode="longest")
    scores = make("hpsv2", folder, head)(pictures, PROMPTS, [{}] * 4).total.numpy()
    np.testing.assert_allclose(scores, (unit(image) * unit(text)).sum(1), atol=CLOSE)
    cropped = embeddings_by_open_clip(network, pictures)[0]
    assert np.abs(scores - (unit(cropped) * unit(text)).sum(1)).max() > 2 * CLOSE


# ------------------------------------------------------------------------------------------------- what all three keep


@pytest.mark.parametrize("name", ["clip_score", "aesthetic", "hpsv2"])
def test_gradients_reach_the_pixels_and_equal_finite_differences(name, clip, pictures, head):
    reward = make(name, clip[1], head)
    assert reward.differentiable
    pixels = (0.25 + pictures / 2).requires_grad_()  # away from the clamp
    metadata = [{}] * 4
    gradient = torch.autograd.grad(reward(pixels, PROMPTS, metadata, gradient=True).total.sum(), pixels)[0]
    assert gradient.flatten(1).norm(dim=1).min() > 0
    direction = gradient / gradient.norm()
    step = 0.02
    up, down = (reward(pixels.detach() + s * direction, PROMPTS, metadata).total.double().sum() for s in (step, -step))
    assert ((up - down) / (2 * step)).item() == pytest.approx(gradient.norm().item(), rel=0.05)


@pytest.mark.parametrize("name", ["clip_score", "aesthetic", "hpsv2"])
def test_scores_do_not_depend_on_the_batch(name, clip, pictures, head):
    reward = make(name, clip[1], head)
    together = reward(pictures, PROMPTS, [{}] * 4).total
    alone = torch.cat([reward(pictures[b : b + 1], [PROMPTS[b]], [{}]).total for b in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert together.std() > 1e-4


@pytest.mark.parametrize("name", ["clip_score", "aesthetic", "hpsv2"])
def test_the_self_test_passes_but_for_the_order_that_random_weights_cannot_know(name, clip, head):
    assert check(make(name, clip[1], head), orderings=()).passed


def test_every_way_to_name_the_weights_gives_the_same_scores(clip, pictures):
    folder = clip[1]
    ways = [
        {"model": tiny.NAME, "pretrained": str(folder / "weights.pt")},
        {"model": tiny.NAME, "pretrained": str(folder / "wrapped.pt")},
        {"model": tiny.NAME, "pretrained": str(folder / "folder" / "open_clip_model.safetensors")},
        {"model": f"local-dir:{folder / 'folder'}"},
    ]
    scores = [resolve("clip_score", options=way)(pictures, PROMPTS, [{}] * 4).total for way in ways]
    for other in scores[1:]:
        assert torch.equal(scores[0], other)


def test_the_encoders_parameters_take_no_gradient(clip, head):
    reward = make("aesthetic", clip[1], head)
    modules = [reward.function.encoder.network, reward.function.head]
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())


def test_the_head_may_be_safetensors(clip, pictures, head, tmp_path):
    save_file(head[0], tmp_path / "head.safetensors")
    both = [
        options("aesthetic", clip[1], head) | {"head": str(path)} for path in (head[1], tmp_path / "head.safetensors")
    ]
    scores = [resolve("aesthetic", options=option)(pictures, PROMPTS, [{}] * 4).total for option in both]
    assert torch.equal(*scores)


# ---------------------------------------------------------------------------------------- missing and unsuitable things


def test_a_missing_package_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "open_clip", None)
    for name in ("clip_score", "aesthetic"):
        with pytest.raises(ImportError, match=rf"reward '{name}' needs open_clip: pip install 'ddpo\[open_clip\]'"):
            resolve(name)


def test_weights_that_cannot_be_downloaded_say_which_and_how_to_get_them(monkeypatch, clip, tmp_path):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("DDPO_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="needs the open_clip weights ViT-L-14-quickgelu openai.*pretrained: FILE"):
        resolve("clip_score")
    with pytest.raises(ValueError, match=r"linearMSE.pth, which could not be downloaded \(URLError.*option head: FILE"):
        resolve("aesthetic", options={"model": tiny.NAME, "pretrained": str(clip[1] / "weights.pt")})


def test_weights_of_another_activation_are_refused_before_a_download():
    with pytest.raises(ValueError, match="openai of ViT-L-14 were trained with QuickGELU.*model: ViT-L-14-quickgelu$"):
        resolve("clip_score", options={"model": "ViT-L-14", "pretrained": "openai"})


def test_hub_files_that_cannot_be_downloaded_say_which_and_how_to_get_them(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"hf download xswu/HPSv2 HPS_v2.1_compressed.pt --revision 697403.*path: FILE"
    ):
        resolve("hpsv2")
    with pytest.raises(ValueError, match=r"needs the model some/clip \(revision abc\).*--local-dir DIR.*model: DIR"):
        resolve("clip_score", options={"model": "hf-hub:some/clip", "revision": "abc"})


def test_a_downloaded_file_with_another_hash_is_refused(monkeypatch, tmp_path, clip):
    def tampered(url, target, progress):
        assert "6934dd81792f086e613a121dbce43082cb8be85e" in url
        Path(target).write_bytes(b"something else")

    monkeypatch.setattr(torch.hub, "download_url_to_file", tampered)
    monkeypatch.setenv("DDPO_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"has sha256 [0-9a-f]{64}, expected 21dd590f3ccdc646"):
        resolve("aesthetic", options={"model": tiny.NAME, "pretrained": str(clip[1] / "weights.pt")})


def test_the_hash_of_a_local_file_is_compared(clip, head):
    folder = clip[1]
    right = hashlib.sha256((folder / "weights.pt").read_bytes()).hexdigest()
    resolve("clip_score", options=options("clip_score", folder, head) | {"sha256": right.upper()})
    with pytest.raises(ValueError, match="expected 0000"):
        resolve("clip_score", options=options("clip_score", folder, head) | {"sha256": "0" * 64})
    with pytest.raises(ValueError, match="expected 0000"):
        resolve("aesthetic", options=options("aesthetic", folder, head) | {"head_sha256": "0" * 64})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "ViT-Z-99"}, "open_clip has no model 'ViT-Z-99'"),
        ({"pretrained": "no_such_tag"}, "'no_such_tag' is neither a file nor a weights tag"),
        ({"pretrained": "/missing/weights.pt"}, "option pretrained: there is no file /missing/weights.pt"),
        ({"model": "local-dir:/missing"}, "/missing has no open_clip_config.json"),
        ({"model": "ViT-B-32"}, "open_clip cannot load ViT-B-32 with"),
    ],
)
def test_wrong_names_and_weights_are_refused(changed, message, clip, head):
    with pytest.raises(ValueError, match=message):
        resolve("clip_score", options=options("clip_score", clip[1], head) | changed)


def test_heads_of_other_models_are_refused(clip, head, tmp_path):
    wide = {"0.weight": torch.zeros(1, 768), "0.bias": torch.zeros(1)}
    broken = {"0.weight": torch.zeros(4, 24), "0.bias": torch.zeros(4), "1.weight": torch.zeros(1, 5)}
    for tensors, message in [(wide, "maps 768 to 1 dimensions, the embedding has 24"), (broken, "no chain of linear")]:
        torch.save(tensors, tmp_path / "head.pth")
        with pytest.raises(ValueError, match=message):
            resolve("aesthetic", options=options("aesthetic", clip[1], head) | {"head": str(tmp_path / "head.pth")})


def test_pickled_objects_are_not_loaded(clip, head, tmp_path):
    torch.save({"layer": torch.nn.Linear(2, 2)}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match="cannot be read as tensors alone"):
        resolve("aesthetic", options=options("aesthetic", clip[1], head) | {"head": str(tmp_path / "head.pth")})
    with pytest.raises(ValueError, match="version must be one of"):
        resolve("hpsv2", options={"version": "v3"})


def test_the_cache_is_used_instead_of_a_second_download(monkeypatch, tmp_path):
    monkeypatch.setenv("DDPO_CACHE", str(tmp_path))
    download = weights.Download(file="a.bin", url="https://nowhere.invalid/a.bin")
    target = weights.cache_folder() / "a.bin"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"kept")
    assert weights.locate_file("any", None, download, option="head") == target
