"""Pictures: right pixels, readable text, clear errors. How they look was judged by eye."""

import numpy as np
import pytest
import torch
from PIL import Image

from trainers.evaluation.evaluator import Evaluation
from trainers.tracking import pictures
from trainers.tracking.pictures import caption, captioned, enlarge, grid, save_curves, side_by_side, spread, to_pil


def test_pixels_are_rounded_not_truncated():
    image = torch.tensor([0.0, 1.0, 0.5, 254.6 / 255, -3.0, 7.0]).expand(3, 1, 6)
    assert np.asarray(to_pil(image))[0, :, 0].tolist() == [0, 255, 128, 255, 0, 255]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_float_type_and_gradients_are_accepted(dtype):
    assert to_pil(torch.rand(3, 4, 5, dtype=dtype, requires_grad=True)).size == (5, 4)


def test_tiny_images_grow_by_whole_multiples_without_blur():
    image = to_pil(torch.rand(3, 32, 32))
    large = enlarge(image)
    assert large.width >= 96
    assert large.width % 32 == 0
    factor = large.width // 32
    assert np.array_equal(np.asarray(large), np.asarray(image).repeat(factor, 0).repeat(factor, 1))


def test_large_images_shrink_and_keep_their_shape():
    assert enlarge(Image.new("RGB", (1024, 512))).size == (384, 192)
    assert enlarge(Image.new("RGB", (1024, 512)), scale=1).size == (1024, 512)


def test_grid_places_every_image_in_reading_order():
    values = torch.tensor([20, 60, 100, 140, 180]) / 255
    images = values.view(5, 1, 1, 1).expand(5, 3, 32, 32)
    picture = np.asarray(grid(images, ["a"] * 5, columns=3, scale=3))
    line = pictures._line_height() + 4
    for index, value in enumerate(values):
        row, column = divmod(index, 3)
        y, x = 10 + row * (96 + line + 10) + 48, 10 + column * (96 + 10) + 48
        assert picture[y, x, 0] == round(float(value) * 255)


def test_a_nearly_square_grid_by_default():
    picture = grid(torch.rand(16, 3, 32, 32), ["three red circles"] * 16)
    assert 0.5 < picture.width / picture.height < 1.2


@pytest.mark.parametrize("width", [96, 160, 384])
@pytest.mark.parametrize("text", ["three red circles", "word " * 60, "x" * 300, "", "赤い丸 " * 20])
def test_captions_never_leave_their_tile(text, width):
    lines = pictures._wrap(text, width, 3)
    assert 1 <= len(lines) <= 3
    assert all(pictures._font().getlength(line) <= width for line in lines)
    if len(text) > 250:
        assert lines[-1].endswith("…")


def test_short_text_is_not_cut():
    assert (
        " ".join(pictures._wrap("a blue square above a green triangle", 160, 3))
        == "a blue square above a green triangle"
    )


def test_the_score_stays_visible_below_a_long_prompt():
    assert caption("three red circles", 0.12345) == "three red circles\nreward 0.123"
    lines = pictures._caption_lines(caption("word " * 60, 0.5), 160)
    assert lines[-1][0] == "reward 0.5"
    assert captioned(Image.new("RGB", (32, 32)), "a\nreward 1").height > 96


def test_the_score_is_green_where_better_and_red_where_worse():
    images = torch.ones(1, 3, 32, 32)

    def colours(old, new):
        picture = side_by_side(images, images, ["a"], [old], [new])
        return {colour for _, colour in picture.getcolors(maxcolors=10**6)}

    assert pictures.BETTER in colours(0.1, 0.9)
    assert pictures.WORSE in colours(0.9, 0.1)
    assert not {pictures.BETTER, pictures.WORSE} & colours(0.5, 0.5)


def test_side_by_side_shows_before_left_of_after():
    before, after = torch.zeros(2, 3, 32, 32), torch.full((2, 3, 32, 32), 100 / 255)
    picture = np.asarray(side_by_side(before, after, ["a", "b"], [0, 0], [1, 1], columns=1))
    row = picture[:, :, 0].tolist()
    middle = next(line for line in row if line.count(100) >= 140 and line.count(0) >= 140)
    assert middle.index(0) < middle.index(100)


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_side_by_side_takes_any_number_of_pairs(count):
    images = torch.rand(count, 3, 32, 32)
    side_by_side(images, images, ["a"] * count, [0.0] * count, [1.0] * count)


def test_unequal_numbers_are_a_mistake_of_the_caller():
    images = torch.rand(2, 3, 32, 32)
    with pytest.raises(AssertionError, match="1 captions for 2 images"):
        grid(images, ["a"])
    with pytest.raises(AssertionError):
        side_by_side(images, images, ["a"], [0, 0], [1, 1])


def test_curves_skip_missing_values_and_keys(tmp_path):
    rows = [{"epoch": e, "reward": e / 10, "kl": None if e == 2 else 0.1 * e} for e in range(5)]
    rows[4]["eval/strict"] = 0.5
    path = save_curves(rows, ["reward", "kl", "eval/strict", "absent"], tmp_path / "curves.png")
    image = Image.open(path)
    assert image.width > 1000
    assert image.height < 500  # three plots, one row


def test_curves_show_standard_errors_where_there_are_some(tmp_path):
    rows = [{"epoch": e, "eval/reward": float(e)} for e in range(3)]
    plain = save_curves(rows, ["eval/reward"], tmp_path / "plain.png").read_bytes()
    barred = save_curves([{**row, "eval/reward_se": 0.5} for row in rows], ["eval/reward"], tmp_path / "bars.png")
    assert barred.read_bytes() != plain
    without = save_curves([{**row, "eval/reward_se": None} for row in rows], ["eval/reward"], tmp_path / "none.png")
    assert without.read_bytes() == plain


def test_curves_without_any_data_say_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="none of kl is in the 1 rows of metrics, which hold epoch, reward"):
        save_curves([{"epoch": 1, "reward": 2.0}], ["kl"], tmp_path / "curves.png")


def test_measures_are_told_in_the_same_order_whatever_the_order_they_came_in():
    order = ["reward", "clip", "clip/part", "heldout/aesthetic", "kl (nats)", "diversity", "ode/reward"]
    values = {name: torch.zeros(2) for name in reversed(order)}
    evaluation = Evaluation(values=values, images=torch.zeros(2, 3, 4, 4, dtype=torch.uint8), prompts=("a", "b"))
    assert list(evaluation.summary()) == order


def test_indices_are_spread_evenly():
    assert spread(8, 4) == [0, 2, 4, 6] and spread(3, 9) == [0, 1, 2]
