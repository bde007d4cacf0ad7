"""The text reward: edit distances against difflib-free recursion, the formula of Flow-GRPO, and real reading."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from rewards import RewardError, resolve
from rewards.builtin.ocr import accuracy, edit_distance, wanted_text

words = st.text(alphabet="abc", max_size=6)


def picture(*lines, size=256, color="darkred"):
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        draw.text((16, 30 + 60 * row), line, font=ImageFont.load_default(size=36), fill=color)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]


@given(first=words, second=words)
def test_edit_distance_equals_its_recursive_definition(first, second):
    @cache
    def distance(i, j):
        if min(i, j) == 0:
            return max(i, j)
        replaced = distance(i - 1, j - 1) + (first[i - 1] != second[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, replaced)

    assert edit_distance(first, second) == distance(len(first), len(second))


@pytest.mark.parametrize(
    ("read", "wanted", "score"),
    [
        ("Hello World", "hello world", 1.0),
        ("say HelloWorld twice", "Hello World", 1.0),  # contained
        ("Hallo World", "Hello World", 0.9),
        ("", "open", 0.0),
        ("a very long unrelated line", "open", 0.0),  # no lower than 0
        ("opn", "open", 0.75),
        ("opposite", "open", 0.0),
    ],
)
def test_accuracy_is_that_of_flow_grpo(read, wanted, score):
    assert accuracy(read, wanted) == pytest.approx(score)


def test_the_wanted_text_is_the_first_quoted_one_or_that_of_the_metadata():
    assert wanted_text('a sign "open" and "closed"', {}) == "open"
    assert wanted_text("a sign “café”", {}) == "café"
    assert wanted_text('a sign "open"', {"text": "shut"}) == "shut"
    for prompt in ("a sign", 'an empty "" one', 'blank "  "'):
        with pytest.raises(ValueError, match="quotes no text"):
            wanted_text(prompt, {})


@pytest.fixture(scope="module")
def reward():
    pytest.importorskip("rapidocr")
    return resolve("ocr")


def test_rendered_text_is_read_exactly_and_other_text_scores_less(reward):
    images = torch.cat([picture("Hello World"), picture("Hello Wurld"), picture("Goodbye"), picture()])
    scores = reward(images, ['a sign "Hello World"'] * 4, [{}] * 4).total
    assert scores.tolist()[:2] == pytest.approx([1.0, 0.9])
    assert scores[2] < 0.5
    assert scores[3] == 0.0


def test_two_lines_are_read_from_top_to_bottom(reward):
    assert reward(picture("Open", "24 hours"), ['"open 24 hours"'], [{}]).total.item() == 1.0
    assert reward(picture("24 hours", "Open"), ['"open 24 hours"'], [{}]).total.item() < 1.0


def test_scores_do_not_depend_on_the_batch(reward):
    images = torch.cat([picture("Open"), picture("Closed")])
    together = reward(images, ['"open"', '"open"'], [{}, {}]).total
    alone = [reward(image[None], ['"open"'], [{}]).total.item() for image in images]
    assert together.tolist() == alone


def test_a_prompt_without_quotes_is_named(reward):
    with pytest.raises(RewardError, match="'a plain sign' quotes no text"):
        reward(picture("Open"), ["a plain sign"], [{}])


def test_a_missing_package_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ImportError, match=r"'ocr' needs rapidocr: pip install 'ddpo\[ocr\]'"):
        resolve("ocr")
