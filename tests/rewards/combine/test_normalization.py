"""Running normalisation against numpy over everything seen, and the course of weights against numpy's interpolation."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards import Reward, RewardTerm, WeightedSum
from rewards.combine.curriculum import WeightSchedule
from rewards.combine.normalization import KEEP, PRIOR, Normalizer


def draws(count, seed, scale=1.0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale + 3


def weighted(values, weights):
    """Mean and standard deviation of weighted values."""
    mean = np.average(values, weights=weights)
    return mean, np.sqrt(np.average((np.asarray(values) - mean) ** 2, weights=weights))


def test_zscore_is_the_score_in_deviations_of_what_was_seen_each_epoch_weighing_less_than_the_next():
    normalizer, seen, weights = Normalizer("r", "zscore"), [], []
    for seed in range(3):
        values = draws(7, seed, scale=5)
        normalizer.update(values, None)
        seen += values.tolist()
        weights = [KEEP * weight for weight in weights] + [1.0] * 7
    mean, std = weighted(seen, weights)
    expected = 2 * (values.double().numpy() - mean) / std
    np.testing.assert_allclose(normalizer.apply(values, None, weight=2.0).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 40])
def test_prompt_zscore_leaves_the_sample_out_and_mixes_in_16_scores_worth_of_all_prompts(count):
    normalizer = Normalizer("r", "prompt_zscore")
    easy, hard = draws(count, 1) + 10, draws(30, 2, scale=3)
    everything = torch.cat([easy, hard])
    normalizer.update(everything, ["easy"] * count + ["hard"] * len(hard))
    result = normalizer.apply(easy, ["easy"] * count, weight=1.0, seen=True)
    whole = everything.double().tolist()
    for i in range(count):
        others = [value for j, value in enumerate(easy.tolist()) if j != i]
        mean, std = weighted(others + whole, [1.0] * len(others) + [PRIOR / len(whole)] * len(whole))
        assert float(result[i]) == pytest.approx((float(easy[i]) - mean) / std, rel=1e-4, abs=1e-5)


def test_a_prompts_zscore_does_not_jump_as_scores_arrive():
    """The score of one picture, as its prompt's own statistics take over from everyone's."""
    normalizer, generator = Normalizer("r", "prompt_zscore"), torch.Generator().manual_seed(0)
    values = torch.randn(64, generator=generator) * 0.5 + 3
    path = []
    for value in values:
        others = torch.randn(32, generator=generator)
        normalizer.update(torch.cat([value[None], others]), ["a", *["b"] * 32])
        path.append(float(normalizer.apply(torch.tensor([3.0]), ["a"], weight=1.0)))
    steps = np.abs(np.diff(path))
    assert steps.max() < 0.25, "everyone's statistics put it at 3, its own end near 0"
    assert path[0] > 2 and path[-1] < 1


def test_a_scale_follows_the_spread_of_recent_scores_and_not_a_mean_that_moves():
    normalizer, spreads = Normalizer("r", "std"), []
    for epoch in range(50):
        normalizer.update(0.05 * draws(256, epoch) + 0.01 * epoch, None)
        spreads.append(normalizer.scale / 0.05)
    everything = torch.cat([0.05 * draws(256, epoch) + 0.01 * epoch for epoch in range(50)])
    assert float(everything.std()) > 0.14, "three times the spread within an epoch"
    assert max(spreads) < 2.2


@pytest.mark.parametrize("kind", ["std", "zscore", "prompt_zscore"])
def test_the_unit_of_one_normalised_reward_stays_that_of_the_first_epoch(kind):
    """So that alpha, the multipliers and the scores of shaping mean the same in every epoch."""
    one = Reward(name="one", function=lambda x, p, m: x.mean((1, 2, 3)))
    reward = WeightedSum([RewardTerm(name="one", normalize=kind, weight=2.0)], rewards=[one])
    slopes = []
    for epoch in range(6):
        scores = draws(400, epoch, scale=0.5 ** (epoch / 2)) + epoch
        reward.update({"one": scores}, ["a"] * 400)
        gap = reward.total({"one": torch.tensor([1.0, 2.0])}, ["a", "a"], epoch=epoch)
        slopes.append(float(gap[1] - gap[0]))
    np.testing.assert_allclose(slopes, 2 / float(draws(400, 0).std(correction=0)), rtol=0.02)


def test_beside_a_reward_in_its_own_unit_a_normalised_one_keeps_its_share():
    names = ("own", "scaled")
    rewards = [Reward(name=name, function=lambda x, p, m: x.mean((1, 2, 3))) for name in names]
    terms = [RewardTerm(name="own"), RewardTerm(name="scaled", normalize="std", weight=3.0)]
    reward = WeightedSum(terms, rewards=rewards)
    for scale in (1.0, 4.0):
        for epoch in range(60):
            reward.update({"own": draws(64, epoch), "scaled": draws(64, epoch, scale=scale)}, None)
        totals = reward.total({"own": torch.tensor([0.0, 1, 0]), "scaled": torch.tensor([0.0, 0, scale])}, epoch=0)
        np.testing.assert_allclose((totals - totals[0]).numpy(), [0, 1, 3 / float(draws(64, 59).std())], rtol=0.1)


@pytest.mark.parametrize("kind", ["std", "prompt_zscore"])
def test_statistics_of_an_older_checkpoint_are_read_and_set_the_unit(kind):
    normalizer = Normalizer("r", kind)
    prompts = {"a": {"count": 20, "mean": 1.0, "squares": 5.0}}
    normalizer.load_state_dict({"count": 100, "mean": 2.0, "squares": 400.0, "prompts": prompts})
    assert (normalizer.scale, normalizer.drift) == (2.0, 1.0)


def test_a_sum_scaled_by_given_scores_is_fixed_by_them_alone():
    one = Reward(name="one", function=lambda x, p, m: x.mean((1, 2, 3)))
    reward = WeightedSum([RewardTerm(name="one", normalize="zscore")], rewards=[one])
    reward.update({"one": draws(64, 0)})
    given = draws(64, 1, scale=7)
    totals = reward.scaled_by({"one": given}).total({"one": given}, epoch=0)
    assert float(totals.mean()) == pytest.approx(0, abs=1e-6)
    assert float(totals.std(correction=0)) == pytest.approx(1, rel=1e-6)


def test_prompt_zscore_needs_prompts_and_says_so():
    normalizer = Normalizer("judge", "prompt_zscore")
    with pytest.raises(ValueError, match="'judge' is normalised per prompt; pass the prompts"):
        normalizer.update(draws(3, 0), None)


@pytest.mark.parametrize("kind", ["none", "std", "zscore", "prompt_zscore"])
def test_statistics_survive_json_and_go_on_bit_by_bit(kind):
    prompts = ["a", "b"] * 20
    whole, resumed = Normalizer("r", kind), Normalizer("r", kind)
    whole.update(draws(40, 1), prompts)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for normalizer in (whole, resumed):
        normalizer.update(draws(40, 2), prompts)
    assert whole.state_dict() == resumed.state_dict()
    values = draws(40, 3)
    assert torch.equal(whole.apply(values, prompts, weight=0.3), resumed.apply(values, prompts, weight=0.3))


def test_equal_scores_normalise_to_zero_and_not_to_nan():
    for kind in ("zscore", "prompt_zscore"):
        normalizer = Normalizer("r", kind)
        normalizer.update(torch.full((40,), 0.1), ["a"] * 40)
        result = normalizer.apply(torch.full((2,), 0.1), ["a", "a"], weight=5.0)
        torch.testing.assert_close(result, torch.zeros(2), rtol=0, atol=1e-6)


def test_components_stay_raw_and_gradients_pass_through_a_zscore(images, prompts, metadata):
    reward = WeightedSum([RewardTerm(name="brightness", normalize="zscore", weight=2.0)])
    raw = reward(images, prompts, metadata).components["brightness"]
    reward.update({"brightness": raw}, prompts)
    again = reward(images, prompts, metadata)
    assert torch.equal(again.components["brightness"], raw)
    np.testing.assert_allclose(
        again.total.numpy(), 2 * (raw - raw.mean()) / raw.std(correction=0), rtol=1e-4, atol=1e-4
    )
    pixels = images.clone().requires_grad_()
    reward(pixels, prompts, metadata, gradient=True).total.sum().backward()
    slope = 2 * 0.587 / 256 / float(raw.double().std(correction=0))
    torch.testing.assert_close(pixels.grad[:, 1], torch.full((4, 16, 16), slope), rtol=1e-4, atol=1e-6)


@given(
    knots=st.lists(st.integers(0, 50), min_size=1, max_size=5, unique=True).map(sorted),
    data=st.data(),
    epoch=st.integers(0, 60),
)
def test_a_linear_schedule_is_numpys_interpolation_and_a_step_schedule_holds(knots, data, epoch):
    factors = data.draw(st.lists(st.floats(-5, 5), min_size=len(knots), max_size=len(knots)))
    linear = WeightSchedule(epochs=tuple(knots), factors=tuple(factors))
    assert linear.at(epoch) == pytest.approx(np.interp(epoch, knots, factors), abs=1e-9)
    step = WeightSchedule(epochs=tuple(knots), factors=tuple(factors), kind="step")
    held = [factor for knot, factor in zip(knots, factors, strict=True) if knot <= epoch] or factors[:1]
    assert step.at(epoch) == held[-1]


def test_the_weight_of_a_sum_follows_its_epoch():
    one = Reward(name="one", function=lambda x, p, m: torch.ones(len(x)))
    schedule = WeightSchedule(epochs=(0, 10), factors=(0.0, 1.0))
    reward = WeightedSum([RewardTerm(name="one", weight=4.0, schedule=schedule)], rewards=[one])
    totals = [float(reward.total({"one": torch.ones(1)}, epoch=epoch)) for epoch in (0, 5, 10, 20)]
    assert totals == [0.0, 2.0, 4.0, 4.0]
    images, prompts, metadata = torch.zeros(1, 3, 2, 2), [""], [{}]
    assert reward(images, prompts, metadata, epoch=5).total.tolist() == [2.0]
    assert reward.components(images, prompts, metadata)["one"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": (), "factors": ()}, "epochs must be at least one number"),
        ({"epochs": (3, 3), "factors": (1.0, 2.0)}, r"rising, got \[3, 3\]"),
        ({"epochs": (0, 5), "factors": (1.0,)}, "factors must be 2 finite numbers"),
        ({"epochs": (0,), "factors": (float("inf"),)}, "factors must be 1 finite numbers"),
    ],
)
def test_impossible_schedules_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        WeightSchedule(**fields)
