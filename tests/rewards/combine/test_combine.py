"""The weighted sum: every part reported raw, scales as numpy's standard deviation, state that survives JSON."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards import Reward, RewardError, RewardTerm, WeightedSum
from rewards.combine.weighted_sum import RESERVED, Moments

finite = st.floats(-1e6, 1e6, allow_nan=False)


def constant(name, *values, parts=None):
    result = torch.tensor(values)
    return Reward(name=name, function=lambda x, p, m: {"score": result, **parts} if parts else result)


def test_total_is_the_weighted_sum_and_components_are_raw(images, prompts, metadata):
    reward = WeightedSum([RewardTerm(name="brightness", weight=2.0), RewardTerm(name="redness", weight=-0.5)])
    scores = reward(images, prompts, metadata)
    assert list(scores.components) == ["brightness", "redness"]
    expected = 2.0 * scores.components["brightness"] - 0.5 * scores.components["redness"]
    torch.testing.assert_close(scores.total, expected)
    torch.testing.assert_close(reward.total(scores.components, epoch=0), scores.total)


def test_components_of_a_reward_are_prefixed_with_its_name(images, prompts, metadata):
    reward = WeightedSum.of(constant("judge", 1.0, 2.0, 3.0, 4.0, parts={"count": torch.ones(4)}))
    scores = reward(images, prompts, metadata)
    assert list(scores.components) == ["judge", "judge/count"]
    assert scores.total.tolist() == [1, 2, 3, 4]


def test_normalised_terms_are_divided_by_the_running_std_once_updated(images, prompts, metadata):
    made = [constant("large", 0.0, 100.0, 200.0, 300.0), constant("small", 0.4, 0.3, 0.2, 0.1)]
    terms = [RewardTerm(name="large", normalize="std"), RewardTerm(name="small", normalize="std", weight=3.0)]
    reward = WeightedSum(terms, rewards=made)
    before = reward(images, prompts, metadata)
    torch.testing.assert_close(before.total, before.components["large"] + 3 * before.components["small"])
    reward.update(before.components)
    after = reward(images, prompts, metadata)
    large, small = (np.asarray(after.components[name]) for name in ("large", "small"))
    np.testing.assert_allclose(after.total.numpy(), large / large.std() + 3 * small / small.std(), rtol=1e-6)
    assert after.components["large"].tolist() == before.components["large"].tolist()


def test_update_leaves_unnormalised_terms_alone(images, prompts, metadata):
    reward = WeightedSum.of(constant("large", 0.0, 100.0, 200.0, 300.0))
    reward.update(reward(images, prompts, metadata).components)
    assert reward.scale("large") == 1.0


def test_equal_scores_are_not_blown_up(images, prompts, metadata):
    reward = WeightedSum([RewardTerm(name="dead", normalize="std")], rewards=[constant("dead", 0.1, 0.1, 0.1, 0.1)])
    for _ in range(3):
        reward.update(reward(images, prompts, metadata).components)
    assert reward.scale("dead") == 1.0
    assert torch.equal(reward(images, prompts, metadata).total, torch.full((4,), 0.1))


@given(batches=st.lists(st.lists(finite, max_size=8), min_size=1, max_size=6))
def test_running_moments_equal_numpys_over_everything_seen(batches):
    moments = Moments()
    for batch in batches:
        moments = moments.including(torch.tensor(batch, dtype=torch.float64))
    seen = np.concatenate([np.array(batch, dtype=np.float64) for batch in batches])
    assert moments.count == len(seen)
    if len(seen):
        size = max(1.0, float(np.abs(seen).max()))
        assert moments.mean == pytest.approx(seen.mean(), abs=1e-9 * size)
        assert moments.std == pytest.approx(seen.std(), abs=1e-6 * size)


def test_moments_survive_a_large_offset():
    values = torch.arange(1000, dtype=torch.float64) % 7 + 1e9
    moments = Moments()
    for batch in values.split(100):
        moments = moments.including(batch)
    assert moments.std == pytest.approx(float(np.std(np.arange(1000) % 7)), rel=1e-6)


def test_state_survives_json_exactly(images, prompts, metadata):
    terms = [RewardTerm(name="brightness", normalize="std"), RewardTerm(name="jpeg_compressibility", normalize="std")]
    one, two = WeightedSum(terms), WeightedSum(terms)
    one.update(one(images, prompts, metadata).components)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert two.state_dict() == one.state_dict()
    assert torch.equal(two(images, prompts, metadata).total, one(images, prompts, metadata).total)


def test_state_of_other_rewards_is_refused():
    saved = WeightedSum([RewardTerm(name="brightness")]).state_dict()
    with pytest.raises(ValueError, match=r"statistics are of brightness, this run's rewards are redness"):
        WeightedSum([RewardTerm(name="redness")]).load_state_dict(saved)


def test_gradients_pass_through_the_sum(images, prompts, metadata):
    reward = WeightedSum([RewardTerm(name="brightness"), RewardTerm(name="redness", weight=2.0)])
    assert reward.differentiable
    pixels = images.clone().requires_grad_()
    reward(pixels, prompts, metadata, gradient=True).total.sum().backward()
    per_channel = torch.tensor([0.299 + 2, 0.587 - 1, 0.114 - 1]) / 256
    torch.testing.assert_close(pixels.grad, per_channel.view(1, 3, 1, 1).expand_as(images))


def test_one_undifferentiable_term_makes_the_sum_so(images, prompts, metadata):
    reward = WeightedSum([RewardTerm(name="brightness"), RewardTerm(name="jpeg_compressibility")])
    assert not reward.differentiable
    with pytest.raises(ValueError, match="'jpeg_compressibility' is not differentiable"):
        reward(images, prompts, metadata, gradient=True)


def test_errors_of_a_term_name_the_term(images, prompts, metadata):
    reward = WeightedSum.of(constant("good", 1.0, 1.0, 1.0, 1.0), constant("bad", 1.0, float("nan"), 1.0, 1.0))
    with pytest.raises(RewardError, match=r"'bad'.*sample 1"):
        reward(images, prompts, metadata)


def test_no_terms_and_terms_of_one_name_are_refused():
    with pytest.raises(ValueError, match="at least one reward"):
        WeightedSum([])
    with pytest.raises(ValueError, match=r"two reward terms report as 'brightness'"):
        WeightedSum([RewardTerm(name="brightness"), RewardTerm(name="rewards.builtin.color:brightness")])
    with pytest.raises(ValueError, match=r"one reward for each of the 1 terms is needed, got 0"):
        WeightedSum([RewardTerm(name="brightness")], rewards=[])


def test_a_sum_of_no_rewards_has_to_be_asked_for_and_has_no_total():
    nothing = WeightedSum((), rewards=())
    scores = nothing(torch.rand(2, 3, 4, 4), ["a", "b"], [{}, {}])
    assert scores.components == {} and scores.total.isnan().tolist() == [True, True]
    assert nothing.differentiable and not nothing.groupwise and nothing.state_dict() == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": " "}, "name must be"),
        ({"name": "brightness", "weight": float("nan")}, "weight must be a finite number, got nan"),
        ({"name": "brightness", "weight": float("inf")}, "weight must be a finite number, got inf"),
        ({"name": "brightness", "label": ""}, "label must be a name without spaces.* got ''"),
        ({"name": "brightness", "label": "a/b"}, "label must be a name without spaces.* got 'a/b'"),
        ({"name": "brightness", "normalize": "mean"}, "normalize must be one of 'none', 'std'.*got 'mean'"),
    ],
)
def test_bad_terms_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RewardTerm(**fields)


def test_labels_tell_two_terms_of_one_reward_apart(images, prompts, metadata, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "class Power:\n    def __init__(self, *, device, of):\n        self.of = of\n"
        "    def __call__(self, images, prompts, metadata):\n"
        "        return {'score': images.mean(dim=(1, 2, 3)) ** self.of, 'power': images.new_full((4,), self.of)}\n"
    )
    terms = [RewardTerm(name=f"{file}:Power", options={"of": of}, label=label, weight=w, normalize="std")
             for of, label, w in ((1.0, "linear", 1.0), (3.0, "cubic", -2.0))]  # fmt: skip
    reward = WeightedSum(terms)
    scores = reward(images, prompts, metadata)
    assert list(scores.components) == ["linear", "linear/power", "cubic", "cubic/power"]
    torch.testing.assert_close(scores.components["cubic"], scores.components["linear"] ** 3)
    assert reward.weights(0) == {"linear": 1.0, "cubic": -2.0}
    reward.update(scores.components)
    assert set(reward.state_dict()) == {"linear", "cubic"}
    assert [reward.component_of(name) for name in ("cubic", "Power")] == ["cubic", "Power"]
    with pytest.raises(ValueError, match="two reward terms report as 'Power' .* give one of them a label"):
        WeightedSum([RewardTerm(name=term.name, options=term.options) for term in terms])


@pytest.mark.parametrize("name", RESERVED)
def test_a_reward_cannot_take_the_name_of_a_measure_of_the_runs_own(name):
    made = Reward(name=name, function=lambda x, p, m: x.mean(dim=(1, 2, 3)))
    with pytest.raises(ValueError, match=f"cannot be reported as '{name}'.* give its term a label"):
        WeightedSum.of(made)
    with pytest.raises(ValueError, match="label must not be one of"):
        RewardTerm(name="brightness", label=name)
    assert WeightedSum([RewardTerm(name=name, label="mine")], rewards=[made]).weights(0) == {"mine": 1.0}
