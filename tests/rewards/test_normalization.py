"""Running normalisation against numpy over everything seen, and the course of weights against numpy's interpolation."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards import Reward, RewardTerm, WeightedSum
from rewards.curriculum import WeightSchedule
from rewards.normalization import MIN_COUNT, Normalizer


def draws(count, seed, scale=1.0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale + 3


def test_zscore_is_the_score_in_deviations_of_everything_seen():
    normalizer, seen = Normalizer("r", "zscore"), []
    for seed in range(3):
        values = draws(7, seed, scale=5)
        normalizer.update(values, None)
        seen += values.tolist()
    expected = 2 * (values.double().numpy() - np.mean(seen)) / np.std(seen)
    np.testing.assert_allclose(normalizer.apply(values, None, weight=2.0).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_prompt_zscore_uses_a_prompts_own_scores_once_there_are_enough():
    normalizer = Normalizer("r", "prompt_zscore")
    easy, hard = draws(MIN_COUNT, 1) + 10, draws(MIN_COUNT // 2, 2, scale=3)
    prompts = ["easy"] * len(easy) + ["hard"] * len(hard)
    everything = torch.cat([easy, hard])
    normalizer.update(everything, prompts)
    result = normalizer.apply(everything, prompts, weight=1.0).double().numpy()
    own = easy.double().numpy()
    np.testing.assert_allclose(result[: len(easy)], (own - own.mean()) / own.std(), rtol=1e-4, atol=1e-5)
    whole = everything.double().numpy()
    expected = (hard.double().numpy() - whole.mean()) / whole.std()
    np.testing.assert_allclose(result[len(easy) :], expected, rtol=1e-4, atol=1e-5)


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
    reward.differentiable_score(pixels, prompts, metadata).total.sum().backward()
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
    totals = []
    for epoch in (0, 5, 10, 20):
        reward.epoch = epoch
        totals.append(float(reward.total({"one": torch.ones(1)})))
    assert totals == [0.0, 2.0, 4.0, 4.0]


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
