"""The tables of `ddpo rewards list` and `ddpo rewards score`."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import register, registry
from rewards.images.picture import load_image
from rewards.tools.cli import expand, list_rewards, score


@pytest.fixture
def folder(tmp_path):
    for name, gray in [("a.png", 0), ("b.png", 102), ("c.png", 255)]:
        Image.new("RGB", (8, 6), (gray, gray, gray)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a picture")
    return tmp_path


def test_list_shows_every_built_in_with_its_gradient_and_range():
    listing = list_rewards()
    for name in registry.BUILT_IN:
        assert re.search(rf"^{name} ", listing, re.MULTILINE)
    assert re.search(r"^brightness +yes +\[0, 1\] +Mean luma", listing, re.MULTILINE)
    assert re.search(r"^jpeg_compressibility +no +\(-inf, 0\] +Minus the size", listing, re.MULTILINE)
    assert "unavailable" not in listing


def test_verbose_list_shows_sources():
    listing = list_rewards(verbose=True)
    assert re.search(
        r"^brightness: Mean luma.*\n(  .*\n)*  defined in +rewards.builtin.color.brightness", listing, re.M
    )
    assert re.search(r"^  defined in +rewards.builtin.color.brightness \(.*color.py:\d+\)$", listing, re.M)


def test_verbose_list_shows_every_option_of_a_class_with_its_default():
    paragraphs = {text.partition(":")[0]: text for text in list_rewards(verbose=True).split("\n\n")}
    assert "option       model (default 'ViT-L-14-quickgelu'): Architecture of open_clip" in paragraphs["clip_score"]
    assert re.search(r"option +terms \(required\): \w+", paragraphs["chebyshev"])
    assert "option" not in paragraphs["brightness"]


def test_a_broken_plug_in_is_listed_as_unavailable(monkeypatch):
    from importlib.metadata import EntryPoint

    broken = EntryPoint(name="broken", value="no_such_plugin:f", group="ddpo.rewards")
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken])
    listing = list_rewards()
    assert re.search(r"^broken +- +- +unavailable: .*no_such_plugin", listing, re.MULTILINE)
    assert "brightness" in listing


def test_score_prints_a_row_per_image_and_the_mean(folder):
    lines = score("brightness", [str(folder / "*.png")]).splitlines()
    assert lines[0].split() == ["image", "brightness"]
    assert [line.split()[-1] for line in lines[2:]] == ["0.0000", "0.4000", "1.0000", "0.4667"]
    assert lines[-1].startswith("mean")


def test_score_takes_options(folder):
    picture = [folder / "b.png"]
    terms = [{"name": "brightness", "low": 0.0, "high": 1.0}]
    scored = score("geometric", picture, options={"terms": terms}).splitlines()[-1].split()
    assert scored[1] == score("brightness", picture).splitlines()[-1].split()[1]


def test_score_shows_components_and_passes_prompts(folder):
    @register
    def lengths(images, prompts, metadata):
        return {
            "score": torch.tensor([float(len(p)) for p in prompts]),
            "half": torch.tensor([len(p) / 2 for p in prompts]),
        }

    both = [folder / "a.png", folder / "b.png"]
    lines = score("lengths", both, prompt=["four", "eight888"]).splitlines()
    assert lines[0].split() == ["image", "lengths", "half"]
    assert lines[2].split()[1:] == ["4.0000", "2.0000"]
    assert lines[3].split()[1:] == ["8.0000", "4.0000"]
    assert score("lengths", both[:1], prompt="four").splitlines()[-1].split()[1:] == ["4.0000", "2.0000"]
    with pytest.raises(ValueError, match="2 images need one prompt for all or 2 prompts, got 3"):
        score("lengths", both, prompt=["a", "b", "c"])


def test_images_load_as_rgb_in_unit_range(folder):
    Image.fromarray(np.array([[0, 128], [255, 64]], dtype=np.uint8)).save(folder / "gray.png")
    image = load_image(folder / "gray.png")
    assert image.shape == (1, 3, 2, 2)
    torch.testing.assert_close(image[0, 0], torch.tensor([[0, 128], [255, 64]]) / 255)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("missing.png", "no such image: .*missing.png"),
        ("*.jpg", r"no file matches '.*\*\.jpg'"),
        (".", r"is a folder; write '.*/\*\.png'"),
    ],
)
def test_missing_files_are_named(folder, pattern, message):
    with pytest.raises(ValueError, match=message):
        expand([str(folder / pattern) if pattern != "." else str(folder)])


def test_no_images_and_unreadable_ones_are_refused(folder):
    with pytest.raises(ValueError, match="no images given"):
        score("brightness", [])
    with pytest.raises(ValueError, match=r"notes.txt cannot be read as an image"):
        score("brightness", [folder / "notes.txt"])
