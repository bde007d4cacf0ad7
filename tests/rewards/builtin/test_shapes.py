import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards.builtin.shapes.render import PALETTE, SIZE, render
from rewards.builtin.shapes.scene import (
    CATEGORIES,
    SHAPES,
    Group,
    Scene,
    caption,
    category,
    parse,
    prompts,
    sample_scene,
    split_of,
)
from rewards.builtin.shapes.verifier import verify
from rewards.registry import resolve

seeds = st.integers(0, 2**32 - 1)


def _truth(num, seed, name=None):
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, name) for _ in range(num)]
    images = np.stack([render(scene, rng) for scene in scenes])
    return images, [caption(scene) for scene in scenes]


# Scenes and captions


@given(seeds, st.sampled_from(CATEGORIES))
def test_parse_inverts_caption_in_every_category(seed, name):
    scene = sample_scene(np.random.default_rng(seed), name)
    assert parse(caption(scene)) == scene
    assert caption(parse(caption(scene))) == caption(scene)
    assert category(scene) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a circle", "single"),
        ("a circle and a square", "two"),
        ("three red circles", "count"),
        ("four crosses", "count"),
        ("a red circle", "color"),
        ("a blue square above a green triangle", "position"),
        ("a purple cross and two yellow circles", "binding"),
    ],
)
def test_captions_of_the_documentation_belong_to_their_category(text, name):
    assert category(parse(text)) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a red",
        "a red dog",
        "two circle",
        "a circles",
        "five circles",
        "a pink circle",
        "A red circle",
        "a  red circle",
        "a red circle and a red circle",
        "two red circles above a blue square",
        "a circle above a square",
        "three red circles and two blue squares",
        "a red circle and a square",
        "a red circle and a blue square and a green cross",
        "a red circle left a blue square",
    ],
)
def test_a_caption_outside_the_grammar_raises_with_it_and_a_valid_example(text):
    with pytest.raises(ValueError, match="above a green triangle") as error:
        parse(text)
    assert repr(text) in str(error.value)


def test_scenes_that_cannot_be_said_are_refused():
    with pytest.raises(ValueError, match="count is 5"):
        Group(count=5, shape="circle")
    with pytest.raises(ValueError, match="'star'"):
        Group(count=1, shape="star")
    with pytest.raises(ValueError, match="'pink'"):
        Group(count=1, shape="circle", color="pink")
    circle, square = Group(count=1, shape="circle", color="red"), Group(count=1, shape="square", color="red")
    with pytest.raises(ValueError, match="'behind'"):
        Scene(groups=(circle, square), relation="behind")
    with pytest.raises(ValueError, match="0 groups"):
        Scene(groups=())


def test_prompts_are_reproducible_and_balanced_over_the_asked_categories():
    records = prompts(60, seed=3, categories=("count", "position", "binding"))
    assert records == prompts(60, seed=3, categories=("count", "position", "binding"))
    assert records != prompts(60, seed=4, categories=("count", "position", "binding"))
    names = [record["metadata"]["category"] for record in records]
    assert [names.count(name) for name in ("count", "position", "binding")] == [20, 20, 20]
    assert all(category(parse(record["prompt"])) == record["metadata"]["category"] for record in records)


def test_train_and_heldout_prompts_are_disjoint_and_both_have_every_category():
    train, heldout = (prompts(600, seed=0, categories=CATEGORIES, split=split) for split in ("train", "heldout"))
    assert not {record["prompt"] for record in train} & {record["prompt"] for record in heldout}
    for records in (train, heldout):
        assert {record["metadata"]["category"] for record in records} == set(CATEGORIES)
    share = np.mean([split_of(record["prompt"]) == "heldout" for record in prompts(4000, seed=0)])
    assert 0.08 < share < 0.25
    with pytest.raises(ValueError, match="'test'"):
        prompts(1, seed=0, split="test")
    with pytest.raises(ValueError, match="'counting'"):
        prompts(1, seed=0, categories=("counting",))


# Pictures


@given(seeds)
def test_render_is_an_image_and_depends_on_the_seed_alone(seed):
    scene = sample_scene(np.random.default_rng(seed))
    image = render(scene, np.random.default_rng(seed))
    assert image.shape == (3, SIZE, SIZE) and image.dtype == np.float32
    assert 0 <= image.min() <= image.max() <= 1
    np.testing.assert_array_equal(image, render(scene, np.random.default_rng(seed)))


# The verifier


def test_rendered_truth_is_accepted_and_other_captions_are_not():
    images, captions = _truth(1500, 11)
    verdict = verify(images, captions)
    assert verdict.strict.mean() >= 0.99
    assert min(verdict.accuracies().values()) >= 0.98
    shuffled = verify(images, list(np.random.default_rng(0).permutation(captions)))
    assert shuffled.strict.mean() <= 0.02
    assert shuffled.partial.mean() < 0.5


def test_partial_is_one_exactly_where_strict_is():
    images, captions = _truth(400, 12)
    noisy = np.clip(images + np.random.default_rng(0).normal(0, 0.15, images.shape), 0, 1)
    for pictures in (images, noisy):
        for texts in (captions, captions[::-1]):
            verdict = verify(pictures, texts)
            assert ((verdict.partial == 1) == (verdict.strict == 1)).all()
            assert 0 <= verdict.partial.min() <= verdict.partial.max() <= 1


@pytest.mark.parametrize("name", CATEGORIES)
def test_an_empty_picture_earns_nothing(name):
    captions = [record["prompt"] for record in prompts(20, seed=0, categories=(name,))]
    verdict = verify(np.full((20, 3, SIZE, SIZE), 0.5), captions)
    assert verdict.strict.sum() == verdict.partial.sum() == 0


def test_extra_and_missing_objects_lower_partial():
    rng = np.random.default_rng(2)
    three = render(parse("three red circles"), rng)[None]
    scores = {
        text: verify(three, [text]).partial[0]
        for text in ("three red circles", "two red circles", "a red circle", "four red circles", "three red squares")
    }
    assert scores["three red circles"] == 1
    assert scores["two red circles"] == pytest.approx(2 / 3)
    assert scores["a red circle"] == pytest.approx(1 / 3)
    assert scores["four red circles"] == pytest.approx(3 / 4)
    assert 0.5 <= scores["three red squares"] < 0.8


@pytest.mark.parametrize(
    ("relation", "opposite"), [("above", "below"), ("below", "above"), ("left of", "right of"), ("right of", "left of")]
)
def test_the_opposite_relation_is_refused(relation, opposite):
    rng = np.random.default_rng(3)
    text = f"a red circle {relation} a blue square"
    images = np.stack([render(parse(text), rng) for _ in range(20)])
    assert verify(images, [text] * 20).strict.mean() == 1
    wrong = verify(images, [text.replace(relation, opposite)] * 20)
    assert wrong.strict.max() == 0 and wrong.partial.max() < 1
    # Swapping the objects' names turns the relation round.
    assert verify(images, [f"a blue square {opposite} a red circle"] * 20).strict.mean() == 1


def test_swapped_colors_are_refused():
    images = np.stack([render(parse("a red circle and a blue square"), np.random.default_rng(4))])
    assert verify(images, ["a red circle and a blue square"]).strict[0] == 1
    assert verify(images, ["a blue circle and a red square"]).strict[0] == 0
    assert verify(images, ["a circle and a square"]).strict[0] == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_small_picture_and_its_enlargement_have_the_same_verdict(shape):
    image = render(parse(f"a green {shape}"), np.random.default_rng(5))[None]
    large = image.repeat(4, axis=2).repeat(4, axis=3)
    assert verify(image, [f"a green {shape}"]).strict[0] == verify(large, [f"a green {shape}"]).strict[0] == 1


def test_malformed_pictures_are_refused_with_their_shape():
    with pytest.raises(ValueError, match=r"\(1, 3, 33, 32\)"):
        verify(np.zeros((1, 3, 33, 32)), ["a circle"])
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        verify(np.zeros((2, 3, 32, 32)), ["a circle"])


def test_the_background_does_not_count():
    images, captions = _truth(300, 13)
    assert verify(np.clip(images * 0.9 + 0.03, 0, 1), captions).strict.mean() > 0.98


def test_palette_hues_are_apart():
    red, green, blue = PALETTE.astype(float).T
    angles = np.sort(np.degrees(np.arctan2(np.sqrt(0.75) * (green - blue), red - (green + blue) / 2)) % 360)
    assert np.diff(angles, append=angles[0] + 360).min() > 40


# The rewards


def test_the_registered_rewards_agree_with_the_verifier():
    images, captions = _truth(32, 14)
    captions[:8] = captions[8:16]
    metadata = [{} for _ in captions]
    verdict = verify(images, captions)
    strict = resolve("shapes_strict")(torch.from_numpy(images), captions, metadata)
    partial = resolve("shapes_partial")(torch.from_numpy(images), captions, metadata)
    both = resolve("shapes")(torch.from_numpy(images), captions, metadata)
    np.testing.assert_array_equal(strict.total.numpy(), verdict.strict)
    np.testing.assert_array_equal(partial.total.numpy(), verdict.partial)
    np.testing.assert_allclose(both.total.numpy(), (verdict.strict + verdict.partial) / 2)
    assert {"strict", "partial"} <= set(both.components)
