"""The Bradley-Terry fit against scipy and closed forms, calibration, and the reward that comes out."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize
from scipy.special import expit
from torch import nn

from rewards import resolve
from rewards.preferences import command
from rewards.preferences.calibration import _ece, _reliability, fit_temperature, measure
from rewards.preferences.command import fit_reward
from rewards.preferences.encoders import make_encoder
from rewards.preferences.ensemble import Ensemble
from rewards.preferences.features import PairFeatures, encode
from rewards.preferences.fit import fit_pairs
from rewards.preferences.fitting import FitConfig, differences, fit_member, negative_log_likelihood
from rewards.preferences.networks import CaptionedCnn
from rewards.preferences.pairs import Pair, write_pairs
from rewards.preferences.pictures import Picture
from rewards.preferences.selection import propose
from rewards.preferences.vocabulary import Vocabulary
from rewards.tools.selftest import check
from tests.rewards.tiny_open_clip import write_tiny_clip
from tests.rewards.tiny_transformers import WORDS, save_models

COLOURS = {"red": 0, "green": 1, "blue": 2}
FAST = FitConfig(members=2, epochs=12, batch_size=32, side=16, shift=0, learning_rate=3e-3, validation=0.2, heldout=0.2)


@pytest.fixture(scope="module")
def colour_pairs(tmp_path_factory):
    """Pictures in shades of one colour; of two pictures, the one brighter in the caption's colour is better."""
    folder = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    pairs = []
    things = ["wall", "door", "car", "hat", "sky"]
    for number in range(360):
        colour = list(COLOURS)[number % 3]
        shades = generator.integers(0, 256, (2, 3))
        paths = [folder / f"{number}{side}.png" for side in "ab"]
        for path, shade in zip(paths, shades, strict=True):
            Image.new("RGB", (16, 16), tuple(int(v) for v in shade)).save(path)
        better = shades[0, COLOURS[colour]] > shades[1, COLOURS[colour]]
        prompt = f"a {colour} {things[number // 3 % 5]}"
        pairs.append(Pair(prompt=prompt, a=paths[0], b=paths[1], label=float(better)))
    return pairs


@pytest.fixture(scope="module")
def fitted(colour_pairs):
    return fit_pairs(colour_pairs, encoder="cnn", config=FAST)


class Strength(nn.Module):
    """One free number for each picture: the Bradley-Terry model of tournaments."""

    def __init__(self, num, start):
        super().__init__()
        self.strength = nn.Parameter(torch.full((num,), start))

    def read(self, captions):
        return captions

    def score(self, images, caption):
        return self.strength[images[:, 0].long()]


def test_the_loss_is_minus_the_log_of_the_bradley_terry_probability():
    difference = torch.linspace(-3, 3, 7, dtype=torch.float64)
    p = expit(difference.numpy())
    for label in (0.0, 0.5, 1.0):
        expected = -(label * np.log(p) + (1 - label) * np.log(1 - p))
        np.testing.assert_allclose(negative_log_likelihood(difference, torch.full_like(difference, label)), expected)


def tournament(num):
    """Noisy games between five players of strengths 0, 0.5, ..., 2."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 5, (2, num), generator=generator)
    a, b = a[a != b], b[a != b]
    label = (torch.rand(len(a), generator=generator) < (0.5 * (a - b)).sigmoid()).float()
    return PairFeatures(
        images=torch.arange(5.0)[:, None], captions=torch.zeros(1, 1, dtype=torch.int64), a=a, b=b,
        caption=torch.zeros_like(a), label=label, group=torch.arange(len(a)),
    )  # fmt: skip


def fit_strengths(pairs, *, gauge, start=0.0):
    config = FitConfig(
        members=1, epochs=150, patience=150, batch_size=400, learning_rate=0.1, weight_decay=0, shift=0, gauge=gauge
    )
    scorer, _ = fit_member(
        lambda: Strength(5, start), pairs, pairs, config, member=0, on_epoch=lambda epoch, loss: None
    )
    return scorer.strength.detach().numpy()


def test_strengths_of_a_tournament_are_the_maximum_likelihood_estimate_of_scipy():
    pairs = tournament(400)
    label = pairs.label.numpy()

    def loss(strength):
        d = strength[pairs.a] - strength[pairs.b]
        return -np.mean(label * np.log(expit(d)) + (1 - label) * np.log(expit(-d)))

    best = minimize(loss, np.zeros(5)).x
    found = fit_strengths(pairs, gauge=0.0)
    np.testing.assert_allclose(found - found.mean(), best - best.mean(), atol=0.01)


def test_the_zero_of_the_scores_is_free_in_the_likelihood_and_pinned_by_the_gauge_term():
    pairs = tournament(400)
    assert fit_strengths(pairs, gauge=0.0, start=1.0).mean() == pytest.approx(1.0, abs=0.15)
    assert fit_strengths(pairs, gauge=0.3, start=1.0).mean() == pytest.approx(0.0, abs=0.1)


def test_pairs_that_share_pictures_of_a_prompt_are_one_group(colour_pairs):
    a, b, c, d, e = (pair.a for pair in colour_pairs[:5])
    pairs = [Pair(prompt=p, a=x, b=y) for p, x, y in [("p", a, b), ("p", c, d), ("p", b, e), ("q", a, b), ("q", a, e)]]
    encoder = make_encoder("cnn", vocabulary=Vocabulary.of("pq"), side=16, device=torch.device("cpu"))
    group = encode(pairs, encoder).group.tolist()
    assert group[0] == group[2] != group[1]
    assert group[3] == group[4] not in (group[0], group[1])


def test_differences_are_those_of_scoring_each_picture_alone(colour_pairs):
    encoder = make_encoder("cnn", vocabulary=Vocabulary.of(["a red wall"]), side=16, device=torch.device("cpu"))
    features = encode(colour_pairs[:9], encoder)
    scorer = encoder.scorer().eval()
    for row in range(9):
        text = scorer.read(features.captions[features.caption[row]][None])
        a, b = (scorer.score(features.images[i[row]][None], text) for i in (features.a, features.b))
        assert float(differences(scorer, features)[row]) == pytest.approx(float(a - b), abs=1e-5)


def test_a_reward_that_depends_on_the_caption_is_learnt_and_holds_for_new_captions(fitted):
    assert fitted.heldout.accuracy > 0.8
    assert fitted.counts["held-out"][1] == 3
    assert fitted.heldout.loss < math.log(2)


def test_the_same_seed_gives_the_same_reward_and_another_does_not(colour_pairs):
    config = FitConfig(members=2, epochs=1, side=16)
    first, again = (fit_pairs(colour_pairs, encoder="cnn", config=config).difference for _ in range(2))
    assert torch.equal(first, again)
    other = fit_pairs(colour_pairs, encoder="cnn", config=FitConfig(members=2, epochs=1, side=16, seed=1))
    assert other.difference.shape != first.shape or not torch.equal(other.difference, first)


def test_members_stop_when_validation_no_longer_improves(colour_pairs):
    config = FitConfig(members=1, epochs=30, patience=1, side=16, learning_rate=0.3)
    losses = fit_pairs(colour_pairs, encoder="cnn", config=config).losses[0]
    assert len(losses) < 30
    assert losses[-1] > min(losses)


def test_temperature_undoes_a_known_scaling():
    generator = torch.Generator().manual_seed(0)
    truth = 2 * torch.randn(20_000, generator=generator, dtype=torch.float64)
    label = (torch.rand(20_000, generator=generator) < truth.sigmoid()).double()
    assert fit_temperature(3 * truth, label) == pytest.approx(3.0, rel=0.05)
    assert measure(truth, label).ece < 0.02
    assert measure(3 * truth, label).ece > 0.05


def test_accuracy_and_calibration_error_of_a_case_worked_by_hand():
    three, one = math.log(3.0), math.log(1.5)  # p = 0.75 and 0.6
    difference = torch.tensor([three, three, -three, -three, one, 0.0])
    label = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.5, 1.0])
    quality = measure(difference, label)
    assert quality.accuracy == pytest.approx((3 + 0.5) / 5)  # the tie is not counted, the zero difference half
    assert [(entry.count, entry.accuracy) for entry in quality.bins] == [(1, 0.5), (1, 0.5), (4, 0.75)]
    assert quality.ece == pytest.approx((0.0 + abs(0.6 - 0.5) + 4 * 0.0) / 6, abs=1e-6)


@pytest.mark.parametrize("num_pairs", [50, 500])
def test_the_calibration_error_of_right_probabilities_is_near_its_floor(num_pairs):
    generator = torch.Generator().manual_seed(1)
    truth = 2 * torch.randn(num_pairs, generator=generator, dtype=torch.float64)
    draws = [(torch.rand(num_pairs, generator=generator) < truth.sigmoid()).double() for _ in range(100)]
    floor = measure(truth, draws[0]).ece_floor
    assert np.mean([_ece(_reliability(truth, label)) for label in draws]) == pytest.approx(floor, rel=0.1)
    assert floor == pytest.approx({50: 0.13, 500: 0.04}[num_pairs], rel=0.25)


def test_pairs_of_one_comparison_count_as_one_draw():
    difference, label = torch.ones(40), torch.tensor([1.0] * 20 + [0.0] * 20)
    alone, together = (measure(difference, label, groups).accuracy_error for groups in (None, torch.arange(40) // 4))
    assert alone == pytest.approx(math.sqrt(0.25 / 39))
    assert together == pytest.approx(math.sqrt(0.25 / 9))


def test_ties_alone_give_no_accuracy_and_are_refused_nowhere():
    assert measure(torch.tensor([0.3]), torch.tensor([0.5])).accuracy is None


# --------------------------------------------------------------------------------------------------------- the reward


def test_the_saved_reward_scores_bit_equal_and_pessimism_takes_standard_deviations_off(fitted, tmp_path):
    fitted.ensemble.save(tmp_path / "r")
    images, prompts = torch.rand(3, 3, 24, 24), ["a red wall", "a blue hat", "words never seen"]
    expected = fitted.ensemble.scores(images, prompts)
    assert torch.equal(Ensemble.load(tmp_path / "r", device=torch.device("cpu")).scores(images, prompts), expected)
    reward = resolve("learned", options={"path": str(tmp_path / "r"), "pessimism": 0.5})
    scores = reward(images, prompts, [{}] * 3)
    torch.testing.assert_close(scores.components["mean"], expected.mean(0))
    torch.testing.assert_close(scores.components["std"], expected.std(0, correction=0), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(
        scores.total, expected.mean(0) - 0.5 * expected.std(0, correction=0), atol=1e-5, rtol=1e-3
    )


def test_the_reward_passes_its_self_test_gradient_included(fitted, tmp_path):
    fitted.ensemble.save(tmp_path / "r")
    report = check(resolve("learned", options={"path": str(tmp_path / "r"), "pessimism": 0.5}), prompt="a red wall")
    assert report.passed, report
    assert {finding.check: finding.passed for finding in report.findings}["gradient"] is True


def test_what_is_wrong_with_a_folder_is_said(fitted, tmp_path):
    with pytest.raises(ValueError, match="is no fitted reward .*ddpo rewards fit"):
        resolve("learned", options={"path": str(tmp_path)})
    with pytest.raises(ValueError, match="pessimism must be at least 0, got -1"):
        resolve("learned", options={"path": str(tmp_path), "pessimism": -1})
    fitted.ensemble.save(tmp_path / "r")
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    (tmp_path / "r" / "config.json").write_text(json.dumps(config | {"members": 3}))
    with pytest.raises(ValueError, match="does not fit .*config.json"):
        resolve("learned", options={"path": str(tmp_path / "r")})
    (tmp_path / "r" / "members.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="members.safetensors cannot be read"):
        resolve("learned", options={"path": str(tmp_path / "r")})


def test_the_command_writes_reward_report_plot_and_held_out_predictions(colour_pairs, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", colour_pairs)
    text = fit_reward(tmp_path / "pairs.jsonl", tmp_path / "r", config=FitConfig(members=2, epochs=1, side=16))
    assert "held-out accuracy 0." in text
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert sum(report["pairs"].values()) == 360
    with Image.open(tmp_path / "r" / "report.png") as plot:
        assert plot.width > 600
    lines = [json.loads(line) for line in (tmp_path / "r" / "heldout.jsonl").read_text().splitlines()]
    assert len(lines) == report["pairs"]["held-out"]
    right = [(line["log_odds"] > 0) == (colour_pairs[line["pair"]].label == 1) for line in lines]
    assert np.mean(right) == pytest.approx(report["held-out"]["accuracy"])
    with pytest.raises(ValueError, match="exists already"):
        fit_reward(tmp_path / "pairs.jsonl", tmp_path / "r")


def test_a_fit_that_is_killed_while_it_writes_leaves_nothing_in_the_way(fitted, colour_pairs, tmp_path, monkeypatch):
    write_pairs(tmp_path / "pairs.jsonl", colour_pairs)
    monkeypatch.setattr(command, "fit_pairs", lambda pairs, **options: fitted)

    def killed(fit, path):
        path.write_text("half a picture")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(command, "draw", killed)
        fit_reward(tmp_path / "pairs.jsonl", tmp_path / "r")
    assert not (tmp_path / "r").exists()
    (tmp_path / "r").mkdir()  # an empty folder is no reason to stop
    fit_reward(tmp_path / "pairs.jsonl", tmp_path / "r")
    assert resolve("learned", options={"path": str(tmp_path / "r")}).name == "learned"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "r"]


def test_disputed_pairs_are_proposed_first(fitted, colour_pairs):
    pictures = [Picture(prompt="a red wall", path=pair.a) for pair in colour_pairs[:12]]
    proposed = propose(pictures, 66, ensemble=fitted.ensemble)

    def doubt(pair):
        pixels = torch.stack(
            [torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) / 255 for p in (pair.a, pair.b)]
        )
        scores = fitted.ensemble.scores(pixels, [pair.prompt] * 2)
        return float((scores[:, 0] - scores[:, 1]).sigmoid().std(correction=0))

    doubts = [doubt(pair) for pair in proposed]
    assert doubts[0] == pytest.approx(max(doubts), abs=1e-6)


@pytest.mark.parametrize("side", [16, 32, 64, 128])
def test_the_cnn_takes_every_documented_side_and_reads_the_caption(side):
    network = CaptionedCnn(side=side, channels=16, num_words=9, width=16)
    image = torch.rand(1, 3, side, side)
    captions = network.read(torch.tensor([[2, 3, 0], [3, 2, 0], [2, 3, 3]]))
    assert len(set(network.score(image.expand(3, -1, -1, -1), captions).tolist())) == 3  # order and length count


def test_padding_does_not_change_a_caption():
    network = CaptionedCnn(side=16, channels=16, num_words=9, width=16)
    short, padded = network.read(torch.tensor([[2, 3]])), network.read(torch.tensor([[2, 3, 0, 0]]))
    torch.testing.assert_close(short, padded)


def test_vocabulary_knows_frequent_words_and_marks_unknown_ones():
    vocabulary = Vocabulary.of(["A red cat", "a blue cat"])
    assert vocabulary.words == ("a", "cat", "blue", "red")
    assert vocabulary.encode(["a green cat sits", ""]).tolist() == [[2, 1, 3], [1, 0, 0]]


# --------------------------------------------------------------------------------------------------- frozen embeddings


@pytest.mark.parametrize("kind", ["open_clip", "clip", "siglip"])
def test_a_head_on_frozen_embeddings_is_fitted_saved_and_differentiable(kind, colour_pairs, tmp_path):
    if kind == "open_clip":
        pytest.importorskip("open_clip")
        write_tiny_clip(tmp_path)
        name = f"open_clip:local-dir:{tmp_path / 'folder'}"
    else:
        save_models(tmp_path)
        name = f"{kind}:{tmp_path / kind}"
    prompts = [f"{colour} {shape}" for colour in ("red", "blue", "green") for shape in WORDS[4:6]]
    pairs = [Pair(prompt=prompts[i % 6], a=p.a, b=p.b, label=p.label) for i, p in enumerate(colour_pairs[:36])]
    fitted = fit_pairs(pairs, encoder=name, config=FitConfig(members=2, epochs=2))
    fitted.ensemble.save(tmp_path / "r")
    reward = resolve("learned", options={"path": str(tmp_path / "r")})
    images = torch.rand(2, 3, 40, 40, requires_grad=True)
    total = reward(images, prompts[:2], [{}] * 2, gradient=True).total
    torch.testing.assert_close(total.detach(), fitted.ensemble.scores(images.detach(), prompts[:2]).mean(0))
    assert torch.autograd.grad(total.sum(), images)[0].abs().max() > 0


def test_an_unknown_encoder_is_refused():
    with pytest.raises(ValueError, match="encoder must be cnn, imagenet, .* got 'resnet'"):
        make_encoder("resnet", vocabulary=Vocabulary.of(["a"]), side=32, device=torch.device("cpu"))
