"""The GenEval reward: the detector and the colours on tiny models of the published classes, and the whole of it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from rewards import RewardError, resolve
from rewards.builtin.geneval.colors import ColorNamer, cut_out
from rewards.builtin.geneval.detector import Detector, preprocess, to_pixels
from rewards.builtin.geneval.rules import Found
from rewards.builtin.geneval.spec import COLORS, parse_spec
from rewards.images.preprocessing import encode_uint8
from tests.rewards.tiny_catalogue import save_clip, save_detector

transformers = pytest.importorskip("transformers")
KINDS = ["circle", "square"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("geneval")
    return root, save_detector(root / "owlv2"), save_clip(root / "clip")


@pytest.fixture(scope="module")
def pictures():
    coarse = torch.rand(3, 3, 5, 5, generator=torch.Generator().manual_seed(3))
    smooth = functional.interpolate(coarse, size=(40, 56), mode="bilinear")
    return (smooth * 255).round() / 255


def reward(saved, **options):
    root = saved[0]
    return resolve(
        "geneval", options={"model": str(root / "owlv2"), "color_model": str(root / "clip"), "threshold": 0.5} | options
    )


@pytest.mark.parametrize("shape", [(40, 56), (64, 64), (56, 24), (90, 130)])
def test_preprocessing_is_that_of_transformers_own_processor(shape):
    coarse = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    image = (functional.interpolate(coarse, size=shape, mode="bilinear") * 255).round()
    process = transformers.Owlv2ImageProcessor(size={"height": 64, "width": 64})
    theirs = process(image[0].to(torch.uint8), return_tensors="pt").pixel_values
    error = (preprocess(image / 255, 64) - theirs).abs()
    assert error.mean() < (1e-6 if max(shape) <= 64 else 0.02)  # smaller pictures need no filter against aliasing


def test_detections_are_those_of_transformers_own_pipeline(saved, pictures):
    root, network, _ = saved
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "owlv2")
    process = transformers.Owlv2ImageProcessor(size={"height": 64, "width": 64})
    words = tokenizer(
        [f"a photo of a {kind}" for kind in KINDS], padding="max_length", max_length=12, return_tensors="pt"
    )
    detect = Detector(reward="geneval", model=str(root / "owlv2"), revision="", sha256="", device=CPU)
    ours = detect(pictures, KINDS, threshold=0.2)
    assert sum(len(found) for objects in ours for found in objects.values()) > 10
    for picture, objects in zip(encode_uint8(pictures).numpy(), ours, strict=True):
        pixels = process(Image.fromarray(picture), return_tensors="pt").pixel_values
        with torch.no_grad():
            output = network(input_ids=words["input_ids"], attention_mask=words["attention_mask"], pixel_values=pixels)
        theirs = process.post_process_object_detection(output, threshold=0.2, target_sizes=[(40, 56)])[0]
        limit = torch.tensor([56.0, 40.0, 56.0, 40.0])
        corners = theirs["boxes"].clamp(min=0).minimum(limit)
        inside = ((corners[:, 2:] - corners[:, :2]) > 0).all(dim=1)
        for number, kind in enumerate(KINDS):
            mine = inside & (theirs["labels"] == number)
            assert [one.score for one in objects[kind]] == pytest.approx(theirs["scores"][mine].tolist(), abs=1e-4)
            np.testing.assert_allclose(
                [one.box for one in objects[kind]] or np.zeros((0, 4)), corners[mine].numpy(), atol=1e-2
            )


def test_boxes_are_in_pixels_of_the_square_and_cut_at_the_image():
    boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0], [0.9, 0.9, 0.1, 0.1]])
    corners = to_pixels(boxes, height=60, width=100)
    assert corners[0].tolist() == [0, 0, 50, 50]
    assert corners[1].tolist() == [0, 0, 100, 60]
    assert corners[2, 1] == corners[2, 3] == 60  # in the padding: no area left


def test_colours_are_the_nearest_of_clips_mean_text_embeddings(saved, pictures):
    root, _, clip = saved
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "clip")
    process = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    box = (5.2, 8.0, 37.9, 33.0)
    templates = ["a photo of a {} square", "a photo of a {}-colored square", "a photo of a {} object"]
    scores = []
    with torch.no_grad():
        crop = Image.fromarray(encode_uint8(pictures)[0].numpy()).crop((5, 8, 38, 33))
        pixels = torch.as_tensor(np.asarray(process(crop)["pixel_values"]))
        image = functional.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=1)[0]
        for color in COLORS:
            words = tokenizer(
                [t.format(color) for t in templates], padding="max_length", max_length=12, truncation=True
            )
            features = clip.get_text_features(
                input_ids=torch.tensor(words["input_ids"]), attention_mask=torch.tensor(words["attention_mask"])
            )
            mean = functional.normalize(features.pooler_output, dim=1).mean(dim=0)
            scores.append(float(functional.cosine_similarity(image, mean, dim=0)))
    namer = ColorNamer(reward="geneval", model=str(root / "clip"), revision="", sha256="", device=CPU)
    assert namer(pictures[0], [box], "square") == [COLORS[int(np.argmax(scores))]]
    assert namer(pictures[0], [], "square") == []


def test_cut_outs_have_whole_pixels_and_never_vanish(pictures):
    image = pictures[0]
    assert torch.equal(cut_out(image, (5.2, 8.0, 37.9, 33.0)), image[:, 8:33, 5:38])
    assert cut_out(image, (55.9, 39.9, 56.0, 40.0)).shape == (3, 1, 1)
    assert cut_out(image, (10.0, 10.0, 10.1, 10.1)).shape == (3, 1, 1)


def test_scores_follow_from_what_was_detected(saved, pictures):
    geneval = reward(saved)
    metadata = [{"include": [{"class": "circle", "count": count}]} for count in (1, 2, 99)]
    scores = geneval(pictures, [""] * 3, metadata)
    numbers = [len(found["circle"]) for found in geneval.function.find(pictures, [parse_spec(m) for m in metadata])]
    expected = [min(1, number / count) for number, count in zip(numbers, (1, 2, 99), strict=True)]
    assert scores.total.tolist() == pytest.approx(expected)
    assert scores.components["strict"].tolist() == [float(value == 1) for value in expected]
    strict = reward(saved, score="strict")(pictures, [""] * 3, metadata)
    assert torch.equal(strict.total, scores.components["strict"])
    assert 0 < expected[2] < 1


def test_objects_are_suppressed_sorted_and_coloured_where_asked(saved, pictures):
    geneval = reward(saved).function
    overlapping = [Found(box=(0, 0, 20, 20), score=0.6), Found(box=(1, 0, 20, 20), score=0.9)]
    apart = Found(box=(30, 20, 50, 39), score=0.7)
    geneval.detect = lambda images, kinds, threshold: [{kind: [*overlapping, apart] for kind in kinds} for _ in images]
    asked = parse_spec({"include": [{"class": "circle", "count": 2, "color": "red"}, {"class": "square", "count": 1}]})
    found = geneval.find(pictures[:1], [asked])[0]
    assert [one.score for one in found["circle"]] == [one.score for one in found["square"]] == [0.9, 0.7]
    assert all(one.color in COLORS for one in found["circle"])
    assert all(one.color is None for one in found["square"])


def test_thresholds_and_rivals_reach_the_detector(saved, pictures):
    geneval = reward(saved, counting_threshold=0.8, rivals=["square", "triangle"]).function
    calls = []

    def detect(images, kinds, threshold):
        calls.append((len(images), kinds, threshold))
        return [{kind: [] for kind in kinds} for _ in images]

    geneval.detect = detect
    one, two = (
        {"include": [{"class": kind, "count": 1}], "tag": tag} for kind, tag in (("circle", ""), ("square", "counting"))
    )
    geneval(pictures, [""] * 3, [one, two, one])
    assert calls == [(2, ("circle", "square", "triangle"), 0.5), (1, ("square", "triangle"), 0.8)]


def test_scores_do_not_depend_on_the_batch(saved, pictures):
    geneval = reward(saved)
    metadata = [
        {"include": [{"class": "circle", "count": 9}]},
        {"include": [{"class": "square", "count": 9, "color": "red"}]},
        {"include": [{"class": "circle", "count": 9}, {"class": "square", "count": 9, "position": ["above", 0]}]},
    ]
    together = geneval(pictures, [""] * 3, metadata).total.tolist()
    alone = [geneval(pictures[b : b + 1], [""], metadata[b : b + 1]).total.item() for b in range(3)]
    assert together == alone
    assert len(set(together)) == 3


def test_the_official_metadata_file_is_a_prompt_source(saved, pictures, tmp_path):
    from trainers.prompts import PromptConfig, load_prompts

    lines = [
        {"tag": "two_object", "include": [{"class": "circle", "count": 1}, {"class": "square", "count": 1}],
         "prompt": "a photo of a circle and a square"},
        {"tag": "counting", "include": [{"class": "circle", "count": 3}], "exclude": [{"class": "circle", "count": 4}],
         "prompt": "a photo of three circles"},
        {"tag": "position", "include": [{"class": "square", "count": 1},
         {"class": "circle", "count": 1, "position": ["left of", 0]}], "prompt": "a circle left of a square"},
    ]  # fmt: skip
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    prompts = load_prompts(PromptConfig(source=str(path)))
    assert [prompt.text for prompt in prompts] == [line["prompt"] for line in lines]
    scores = reward(saved)(pictures, [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts])
    assert scores.total.shape == (3,)


def test_prompts_without_metadata_and_impossible_options_are_refused(saved, pictures):
    with pytest.raises(RewardError, match="needs GenEval metadata with the key include"):
        reward(saved)(pictures[:1], ["a dog"], [{}])
    for options, message in [
        ({"score": "soft"}, "score must be one of partial, strict, got 'soft'"),
        ({"threshold": 0.0}, r"threshold must lie in \(0, 1\], got 0.0"),
        ({"overlap": 1.5}, r"overlap must lie in \(0, 1\], got 1.5"),
        ({"rivals": "cat"}, "rivals must be a list of names"),
        ({"model": str(saved[0] / "clip")}, "cannot be loaded as Owlv2|lacks .* weights of Owlv2"),
    ]:
        with pytest.raises(ValueError, match=message):
            reward(saved, **options)
