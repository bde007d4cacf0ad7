"""Tesseract as the second reader: the same score of what another program reads."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from rewards import resolve
from rewards.models.text_readers import TesseractReader
from rewards.tools.samples import sample
from rewards.tools.selftest import check


def picture(*lines):
    image = Image.new("RGB", (256, 256), "white")
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        draw.text((16, 30 + 60 * row), line, font=ImageFont.load_default(size=36), fill="darkred")
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def reward():
    import shutil

    if shutil.which("tesseract") is None:
        pytest.skip("tesseract is not installed")
    return resolve("ocr", options={"engine": "tesseract", "threads": 2})


def test_rendered_text_is_read_exactly_and_other_text_scores_less(reward):
    images = torch.cat([picture("Hello World"), picture("Hello Wurld"), picture("Open", "24 hours"), picture()])
    prompts = ['a sign "Hello World"', 'a sign "Hello World"', '"open 24 hours"', '"open"']
    assert reward(images, prompts, [{}] * 4).total.tolist() == pytest.approx([1.0, 0.9, 1.0, 0.0])


def test_both_readers_agree_on_the_sample_pictures(reward):
    pytest.importorskip("rapidocr")
    other = resolve("ocr")
    images = torch.cat([sample(name) for name in ("text", "text_wrong", "cat")])
    prompts = ['a sign that says "open"'] * 3
    ours, theirs = (reader(images, prompts, [{}] * 3).total.tolist() for reader in (reward, other))
    assert ours == theirs
    assert ours[0] == 1 > ours[1]


def test_the_self_test_passes_with_the_known_orders(reward):
    assert check(reward).passed


def test_what_is_missing_is_named(reward, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"no language data 'xyz'.*apt install tesseract-ocr-xyz"):
        resolve("ocr", options={"engine": "tesseract", "language": "eng+xyz"})
    with pytest.raises(ValueError, match="engine must be one of rapidocr, tesseract, got 'paddle'"):
        resolve("ocr", options={"engine": "paddle"})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="needs the program tesseract, .*`apt install tesseract-ocr`"):
        resolve("ocr", options={"engine": "tesseract"})


def test_a_program_that_fails_is_an_error_and_not_an_empty_text(monkeypatch, tmp_path):
    program = tmp_path / "tesseract"
    program.write_text('#!/bin/sh\nif [ "$1" = --list-langs ]; then echo eng; exit 0; fi\necho broken >&2\nexit 3\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    reader = TesseractReader(reward="ocr", language="eng", threads=1)
    with pytest.raises(RuntimeError, match="ended with status 3: broken"):
        reader(picture("Open"))
