"""Chebyshev and products of rewards: the formulas, a Pareto front that no weighted sum can reach, gradients."""

import numpy as np
import pytest
import torch

from rewards import RewardTerm, WeightedSum, register, resolve
from rewards.combine.weighted_sum import Moments


@pytest.fixture(autouse=True)
def parts():
    """Two rewards that read their score off the image: red and green of its pixels."""

    @register("first", differentiable=True, range=(0, 1))
    def first(images, prompts, metadata):
        return images[:, 0].mean(dim=(1, 2))

    @register("second", differentiable=True, range=(0, 2))
    def second(images, prompts, metadata):
        return {"score": 2 * images[:, 1].mean(dim=(1, 2)), "half": images[:, 1].mean(dim=(1, 2))}


def images_of(first, second):
    pictures = torch.zeros(len(first), 3, 2, 2)
    pictures[:, 0] = torch.as_tensor(first, dtype=torch.float32).view(-1, 1, 1)
    pictures[:, 1] = torch.as_tensor(second, dtype=torch.float32).view(-1, 1, 1) / 2
    return pictures


def score(name, terms, pictures, **options):
    reward = resolve(name, options={"terms": terms, **options})
    return reward(pictures, [""] * len(pictures), [{}] * len(pictures))


BOTH = [{"name": "first"}, {"name": "second"}]


def test_chebyshev_is_the_worst_weighted_shortfall_and_parts_are_raw():
    terms = [{"name": "first", "weight": 3, "ideal": 0.9}, {"name": "second", "ideal": 1.5}]
    scores = score("chebyshev", terms, images_of([0.5, 0.9], [1.0, 0.5]))
    assert scores.total.tolist() == pytest.approx([-max(3 * 0.4, 0.5), -max(0.0, 1.0)])
    assert list(scores.components) == ["first", "second", "second/half"]
    assert scores.components["second"].tolist() == pytest.approx([1.0, 0.5])
    augmented = score("chebyshev", terms, images_of([0.5], [1.0]), augment=0.1).total.item()
    assert augmented == pytest.approx(-1.2 - 0.1 * (1.2 + 0.5))


def test_ideals_and_bounds_come_from_the_ranges_when_not_given():
    assert score("chebyshev", BOTH, images_of([0.5], [1.8])).total.item() == pytest.approx(-0.5)
    assert score("geometric", BOTH, images_of([0.5], [1.0])).total.item() == pytest.approx(0.5)


def test_geometric_is_scipys_weighted_geometric_mean_and_product_the_product():
    import scipy.stats

    terms = [{"name": "first", "weight": 3}, {"name": "second", "weight": 1, "low": 0.5, "high": 1.5}]
    shares = [0.4, (1.2 - 0.5) / 1.0]
    pictures = images_of([0.4], [1.2])
    expected = scipy.stats.gmean(shares, weights=[3, 1])
    assert score("geometric", terms, pictures).total.item() == pytest.approx(expected, rel=1e-5)
    product = score("geometric", terms, pictures, mean=False).total.item()
    assert product == pytest.approx(0.4**3 * 0.7, rel=1e-5)


def test_a_part_at_its_lowest_is_nought_however_small_its_weight_and_its_slope_stays_finite():
    terms = [{"name": "first", "weight": 1}, {"name": "second", "weight": 0.1}]
    shares = [0.0, 1e-5, 0.5e-4, 1e-4, 1.001e-4, 1e-3]
    totals = [score("geometric", terms, images_of([1.0], [2 * share])).total.item() for share in shares]
    assert totals[0] == 0.0 and totals == sorted(totals)
    assert totals[3] == pytest.approx(1e-4 ** (0.1 / 1.1), rel=1e-4)  # from there on the weighted geometric mean
    assert totals[1] / 1e-5 == pytest.approx(totals[2] / 0.5e-4, rel=1e-4), "a straight line below it"


def test_one_part_at_its_lowest_takes_the_product_with_it():
    low, balanced = score("geometric", BOTH, images_of([1.0, 0.5], [0.0, 1.0])).total.tolist()
    assert low == 0.0
    assert balanced == pytest.approx(0.5)
    sums = WeightedSum([RewardTerm(name="first"), RewardTerm(name="second", weight=0.5)])
    equal = sums(images_of([1.0, 0.5], [0.0, 1.0]), [""] * 2, [{}] * 2).total
    assert equal.tolist() == pytest.approx([1.0, 1.0])  # a sum cannot tell them apart


def test_chebyshev_reaches_the_dented_part_of_a_pareto_front_and_no_weighted_sum_does():
    """On the front r2 / 2 = (1 - sqrt(r1))^2, bent towards the origin, a sum is always best at an end."""
    root = np.linspace(0, 1, 101)
    pictures = images_of(root**2, 2 * (1 - root) ** 2)
    for share in np.linspace(0.05, 0.95, 19):
        terms = [RewardTerm(name="first", weight=share), RewardTerm(name="second", weight=(1 - share) / 2)]
        assert int(WeightedSum(terms)(pictures, [""] * 101, [{}] * 101).total.argmax()) in (0, 100)
    best = set()
    for share in np.linspace(0.05, 0.95, 19):
        terms = [{"name": "first", "weight": share}, {"name": "second", "weight": (1 - share) / 2}]
        best.add(int(score("chebyshev", terms, pictures).total.argmax()))
    assert len(best) > 8
    assert all(0 < index < 100 for index in best)


@pytest.mark.parametrize("name", ["chebyshev", "geometric"])
def test_gradients_equal_finite_differences(name):
    reward = resolve(name, options={"terms": BOTH})
    assert reward.differentiable
    pixels = images_of([0.3, 0.8], [0.9, 0.7]).double()
    pixels[:, 2] = 0.5
    pixels.requires_grad_()
    function = lambda x: reward.function(x, [""] * 2, [{}] * 2)["score"].double()  # noqa: E731
    assert torch.autograd.gradcheck(function, pixels, eps=1e-3, atol=1e-3, rtol=1e-3)  # parts are float32


@pytest.mark.parametrize("name", ["chebyshev", "geometric"])
def test_a_part_without_gradient_makes_the_whole_so(name):
    terms = [{"name": "first"}, {"name": "entropy"}]
    reward = resolve(name, options={"terms": terms})
    assert not reward.differentiable
    pictures = torch.rand(2, 3, 4, 4)
    reward(pictures, [""] * 2, [{}] * 2)
    with pytest.raises(ValueError, match="is not differentiable"):
        reward(pictures, [""] * 2, [{}] * 2, gradient=True)


def test_they_are_terms_of_a_weighted_sum_like_any_reward():
    reward = WeightedSum([RewardTerm(name="chebyshev", options={"terms": BOTH}), RewardTerm(name="redness")])
    components = reward(torch.rand(3, 3, 4, 4), [""] * 3, [{}] * 3).components
    assert list(components) == ["chebyshev", "chebyshev/first", "chebyshev/second", "chebyshev/second/half", "redness"]
    assert reward.state_dict()["chebyshev"]["count"] == Moments().count


@pytest.mark.parametrize(
    ("name", "terms", "message"),
    [
        ("chebyshev", [], "needs at least one term"),
        ("chebyshev", [{"weight": 1}], "a term is a mapping with name"),
        ("chebyshev", ["first"], "a term is a mapping with name"),
        ("chebyshev", [{"name": "first", "wieght": 1}], "a term is a mapping with name"),
        ("chebyshev", [{"name": "first", "weight": 0}], "first: weight must be a positive number, got 0"),
        ("chebyshev", [{"name": "first", "weight": "2"}], "weight of first must be a number, got '2'"),
        ("chebyshev", [{"name": "first"}, {"name": "first"}], "the parts must be different rewards"),
        ("chebyshev", [{"name": "jpeg_incompressibility"}], "has no finite bound; give its term a number ideal"),
        ("chebyshev", [{"name": "firsts"}], "did you mean 'first'"),
        ("geometric", [{"name": "first", "low": 1, "high": 0}], "every low must be below its high"),
        ("geometric", [{"name": "jpeg_compressibility"}], "give its term a number low"),
    ],
)
def test_impossible_terms_are_refused(name, terms, message):
    with pytest.raises(ValueError, match=message):
        resolve(name, options={"terms": terms})


@pytest.mark.parametrize("name", ["rank", "chebyshev", "geometric"])
def test_a_part_called_score_does_not_take_the_place_of_the_total(name, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def score(images, prompts, metadata):\n    return images.mean(dim=(1, 2, 3))\n")
    images = torch.tensor([0.2, 0.4, 0.8]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    part = {"name": f"{file}:score", "ideal": 1.0, "low": 0.0, "high": 0.8}
    options = {"reward": f"{file}:score"} if name == "rank" else {"terms": [part]}
    scores = resolve(name, options=options)(images, ["a"] * 3, [{}] * 3)
    expected = {"rank": [0.0, 0.5, 1.0], "chebyshev": [-0.8, -0.6, -0.2], "geometric": [0.25, 0.5, 1.0]}[name]
    assert scores.total.tolist() == pytest.approx(expected, abs=1e-6)
    assert scores.components["raw/score"].tolist() == pytest.approx([0.2, 0.4, 0.8])
