"""Advantages against naive loops."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpo.control.checks.advantages import CHECKS
from ddpo.credit.advantages import AdvantageConfig, AdvantageEstimator
from ddpo.credit.baselines import cost_to_go, leave_one_out
from ddpo.validation import FieldError

scores_lists = st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=12)


def estimate(scores, groups, *, prompts=None, kl=None, alpha=0.0, num_steps=1, **config):
    scores, groups = torch.as_tensor(scores, dtype=torch.float32), torch.as_tensor(groups)
    prompts = prompts or [f"prompt {group}" for group in groups.tolist()]
    estimator = AdvantageEstimator(AdvantageConfig(**config))
    return estimator(scores, groups, prompts, kl=kl, alpha=alpha, num_steps=num_steps)


@given(scores_lists, st.data())
def test_leave_one_out_subtracts_the_mean_of_the_others(scores, data):
    groups = data.draw(st.lists(st.integers(0, 3), min_size=len(scores), max_size=len(scores)))
    values = torch.tensor(scores, dtype=torch.float64)
    result = leave_one_out(values, torch.tensor(groups))
    for i, (value, group) in enumerate(zip(scores, groups, strict=True)):
        others = [scores[j] for j in range(len(scores)) if groups[j] == group and j != i]
        expected = value - sum(others) / len(others) if others else 0.0
        assert math.isclose(float(result[i]), expected, rel_tol=1e-9, abs_tol=1e-9)


def test_the_leave_one_out_baseline_does_not_shrink_the_gradient():
    """E[(r - b) dlog p] for r = x, x ~ N(theta, 1) is 1 whatever the group size G; a plain mean gives 1 - 1/G."""
    x = torch.randn(200_000, 4, dtype=torch.float64)
    groups = torch.arange(200_000).repeat_interleave(4)
    own = leave_one_out(x.flatten(), groups)
    per_group = (own * x.flatten()).reshape(-1, 4).mean(1)
    error = per_group.std() / math.sqrt(len(per_group))
    assert abs(per_group.mean() - 1) < 4.5 * error
    plain = ((x - x.mean(1, keepdim=True)) * x).mean()
    assert abs(plain - 0.75) < 0.01


@given(st.integers(1, 5), st.integers(1, 6), st.floats(0, 10), st.integers(0, 999))
def test_cost_to_go_equals_a_double_loop_over_later_steps(batch, steps, alpha, seed):
    kl = torch.rand(batch, steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    result = cost_to_go(kl, alpha)
    for b in range(batch):
        for k in range(steps):
            expected = alpha * sum(float(kl[b, j]) for j in range(k + 1, steps))
            assert math.isclose(float(result[b, k]), expected, rel_tol=1e-9, abs_tol=1e-12)


@given(
    st.integers(0, 999), st.sampled_from(["none", "std", "group_std", "batch_std"]), st.sampled_from(["group", "batch"])
)
def test_advantages_equal_a_naive_loop(seed, scale, baseline):
    generator = torch.Generator().manual_seed(seed)
    scores, kl = torch.randn(12, generator=generator), torch.rand(12, 3, generator=generator)
    groups, alpha = torch.arange(12) // 4, 0.7
    result = estimate(
        scores, groups, kl=kl, alpha=alpha, num_steps=3, baseline=baseline, scale=scale, clip=None,
    )  # fmt: skip
    for i in range(12):
        members = [j for j in range(12) if baseline == "batch" or groups[j] == groups[i]]
        others = [j for j in members if j != i]
        pool = scores[list(range(12)) if scale == "batch_std" else members].double()
        divisor = 1.0 if scale == "none" else float(pool.std(correction=0))
        for k in range(3):
            returns = scores.double() - alpha * kl[:, k + 1 :].double().sum(1)
            expected = float(returns[i] - returns[others].mean()) / divisor
            assert math.isclose(float(result.values[i, k]), expected, rel_tol=1e-5, abs_tol=1e-5)
        assert math.isclose(float(result.kl_weight[i]), alpha / divisor, rel_tol=1e-5)


def test_groups_need_not_be_contiguous():
    scores = torch.randn(8)
    order = torch.tensor([3, 0, 7, 5, 1, 6, 2, 4])
    groups = torch.arange(8) // 4
    straight, shuffled = estimate(scores, groups), estimate(scores[order], groups[order])
    torch.testing.assert_close(straight.values[order], shuffled.values)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_alpha_is_reward_units_per_nat_by_default_and_this_multiple_under_a_groups_own_scale(check):
    for found in check.run():
        assert found.passed, found
    assert AdvantageConfig().scale == "batch_std" and AdvantageConfig().clip is None


@pytest.mark.parametrize(("rule", "flat_weight"), [("batch_std", 1), ("group_std", 1), ("none", 1), ("std", 0)])
def test_a_flat_group_keeps_its_kl_and_is_counted(rule, flat_weight):
    scores = [1.0, 1.0, 0.0, 3.0, 7.1, 7.1]
    kl = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    result = estimate(scores, [0, 0, 1, 1, 2, 2], kl=kl, alpha=0.5, num_steps=2, scale=rule)
    assert result.zero_variance_groups == 2
    flat = [0, 1, 4, 5]
    assert result.kl_weight[flat].gt(0).all() == bool(flat_weight)
    assert result.kl_weight[2:4].gt(0).all()
    torch.testing.assert_close(result.values[flat, 1], torch.zeros(4), rtol=0, atol=1e-6)
    own = leave_one_out(kl[:, 1].double(), torch.tensor([0, 0, 1, 1, 2, 2]))
    expected = -result.kl_weight.double() * own  # the cost that is still to come, divided by the same scale
    torch.testing.assert_close(result.values[flat, 0].double(), expected[flat], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_no_group_weighs_more_than_ten_times_the_typical_one_whatever_the_unit(unit):
    scores = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 0.99999, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64) * unit
    groups, kl, alpha = torch.arange(12) // 4, torch.rand(12, 2), 0.05 * unit
    weights = {
        rule: estimate(scores, groups, kl=kl, alpha=alpha, num_steps=2, scale=rule).kl_weight[::4].tolist()
        for rule in ("batch_std", "group_std")
    }
    typical = 0.05 / (0.05 / 3) ** 0.5  # one group of variance .05, two of none to speak of
    assert weights["group_std"] == pytest.approx([0.05 / 0.05**0.5, typical, typical], rel=1e-5)
    assert weights["batch_std"] == pytest.approx([0.05 * unit / float(scores.std(correction=0))] * 3, rel=1e-5)
    if unit == 1.0:  # what runs do that began with it
        old = estimate(scores, groups, kl=kl, alpha=0.05, num_steps=2, scale="std").kl_weight[::4].tolist()
        assert old[1] > 11_000 and old[2] == 0


def test_a_batch_whose_scores_agree_keeps_the_last_scale_and_none_falls_to_less_than_a_tenth():
    estimator = AdvantageEstimator(AdvantageConfig(baseline="batch"))
    groups, kl = torch.zeros(4, dtype=torch.int64), torch.rand(4, 1)

    def weight(*scores):
        return float(estimator(torch.tensor(scores), groups, [""] * 4, kl=kl, alpha=1.0, num_steps=1).kl_weight[0])

    assert weight(0.5, 0.5, 0.5, 0.5) == 1.0  # nothing is known yet: as with none
    assert weight(0.0, 0.0, 2.0, 2.0) == pytest.approx(1.0)
    assert weight(1.0, 1.0, 1.0, 1.0) == pytest.approx(1.0)
    assert weight(0.0, 0.0, 0.002, 0.002) == pytest.approx(10.0)
    restored = AdvantageEstimator(estimator.config)
    restored.load_state_dict(json.loads(json.dumps(estimator.state_dict())))
    assert weight(0.0, 0.0, 0.002, 0.002) == pytest.approx(100.0)
    assert restored.state_dict() == {"scale": pytest.approx(0.1), "prompts": {}}


@pytest.mark.parametrize("scale", ["none", "std", "group_std", "batch_std"])
@pytest.mark.parametrize("baseline", ["group", "prompt", "batch"])
def test_equal_scores_give_zero_and_never_nan(baseline, scale):
    result = estimate([0.1] * 6, [0, 0, 0, 1, 1, 1], baseline=baseline, scale=scale)
    assert result.zero_variance_groups == 2
    torch.testing.assert_close(result.values, torch.zeros(6, 1), rtol=0, atol=1e-7)


def test_clip_bounds_the_advantages_and_reports_the_share():
    result = estimate([0.0] * 19 + [100.0], [0] * 20, clip=2.0, num_steps=1)
    assert result.values.max() == 2.0
    assert result.clipped == pytest.approx(1 / 20)
    unclipped = estimate([0.0] * 19 + [100.0], [0] * 20, clip=None)
    assert unclipped.clipped == 0 and unclipped.values.max() > 2


def test_dividing_by_the_std_divides_reward_cost_and_kl_weight_alike():
    scores, kl = torch.randn(16), torch.rand(16, 3)
    groups = torch.arange(16) // 8
    plain = estimate(scores, groups, kl=kl, alpha=0.3, num_steps=3, scale="none", clip=None)
    scaled = estimate(scores, groups, kl=kl, alpha=0.3, num_steps=3, scale="batch_std", clip=None)
    std = scores.std(correction=0)
    torch.testing.assert_close(scaled.values * std, plain.values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scaled.kl_weight * std, plain.kl_weight)


@pytest.mark.parametrize("scale", ["std", "group_std", "batch_std"])
def test_rescaling_reward_and_alpha_together_changes_nothing_when_divided_by_a_std(scale):
    scores, kl = torch.randn(16), torch.rand(16, 3)
    groups = torch.arange(16) // 8
    one = estimate(scores, groups, kl=kl, alpha=0.3, num_steps=3, scale=scale)
    ten = estimate(10 * scores, groups, kl=kl, alpha=3.0, num_steps=3, scale=scale)
    torch.testing.assert_close(one.values, ten.values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.kl_weight, ten.kl_weight, rtol=1e-4, atol=1e-6)


def test_without_kl_every_step_has_the_same_advantage():
    result = estimate(torch.randn(8), torch.arange(8) // 4, num_steps=5)
    assert result.values.shape == (8, 5)
    assert (result.values == result.values[:, :1]).all()


def test_prompt_history_uses_the_batch_until_min_count_then_the_prompts_own_last_scores():
    """Every baseline is the mean of the others, every scale the std of all."""
    estimator = AdvantageEstimator(AdvantageConfig(baseline="prompt", scale="group_std", min_count=4, buffer_size=6))

    def run(scores, prompts):
        groups = torch.zeros(len(scores), dtype=torch.int64)
        values = estimator(torch.tensor(scores), groups, prompts, kl=None, alpha=0.0, num_steps=1).values
        return values[:, 0].tolist()

    def expected(score, others, everything):
        return (score - sum(others) / len(others)) / float(torch.tensor(everything).std(correction=0))

    batch = [1.0, 2.0, 5.0]
    first = [expected(1.0, [2, 5], batch), expected(2.0, [1, 5], batch), expected(5.0, [1, 2], batch)]
    assert run(batch, ["a", "a", "b"]) == pytest.approx(first)

    known = [1.0, 2.0, 3.0, 4.0]  # "a" has min_count scores now, "b" has two
    second = [expected(3.0, [1, 2, 4], known), expected(4.0, [1, 2, 3], known), expected(7.0, [3, 4], [3.0, 4.0, 7.0])]
    assert run([3.0, 4.0, 7.0], ["a", "a", "b"]) == pytest.approx(second)

    recent = [2.0, 3.0, 4.0, 5.0, 6.0, 9.0]  # the oldest of seven fell out of the buffer
    third = [expected(score, [other for other in recent if other != score], recent) for score in recent[3:]]
    assert run([5.0, 6.0, 9.0], ["a", "a", "a"]) == pytest.approx(third)

    last = [12.0, 13.0, 15.0, 18.0, 20.0, 29.0]  # of seven in one batch the first fell out, and is not in the mean
    fourth = [expected(11.0, last, last), *(expected(s, [o for o in last if o != s], last) for s in last)]
    assert run([11.0, *last], ["a"] * 7) == pytest.approx(fourth)


def test_the_prompt_baseline_does_not_shrink_the_gradient():
    """As for groups: with 4 scores of a prompt, none remembered before, a mean with the own one in it gives 0.75."""
    config = AdvantageConfig(baseline="prompt", min_count=2, scale="none", clip=None)
    x = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prompts = [str(i // 4) for i in range(x.numel())]
    groups = torch.arange(20_000).repeat_interleave(4)
    values = AdvantageEstimator(config)(x.flatten(), groups, prompts, kl=None, alpha=0.0, num_steps=1).values
    per_prompt = (values.flatten() * x.flatten()).reshape(-1, 4).mean(1)
    assert abs(per_prompt.mean() - 1) < 4.5 * per_prompt.std() / math.sqrt(len(per_prompt))


def test_prompt_history_survives_a_round_trip_through_json():
    config = AdvantageConfig(baseline="prompt", min_count=2, buffer_size=3)
    scores, groups, prompts = torch.randn(6), torch.arange(6) // 3, list("aaabbb")
    continued, restored = AdvantageEstimator(config), AdvantageEstimator(config)
    continued(scores, groups, prompts, kl=None, alpha=0.0, num_steps=2)
    restored.load_state_dict(json.loads(json.dumps(continued.state_dict())))
    later = torch.randn(6)
    one, two = (e(later, groups, prompts, kl=None, alpha=0.0, num_steps=2) for e in (continued, restored))
    assert torch.equal(one.values, two.values)
    assert continued.state_dict() == restored.state_dict()
    assert all(len(history) == 3 for history in restored.state_dict()["prompts"].values())


@pytest.mark.parametrize("prompts", [["a", "b"], ["scale", "prompts"]])
def test_scores_that_an_older_checkpoint_remembers_are_read(prompts):
    estimator = AdvantageEstimator(AdvantageConfig(baseline="prompt", min_count=2, buffer_size=3))
    old = {prompt: [1.0, 2.0] for prompt in prompts}
    estimator.load_state_dict(old)
    assert estimator.state_dict() == {"scale": None, "prompts": old}


@pytest.mark.parametrize(("field", "value"), [("clip", 0.0), ("min_count", 1), ("buffer_size", 8)])
def test_an_option_out_of_range_is_refused_with_its_field(field, value):
    with pytest.raises(FieldError, match=f"{field} must be .*got {value}"):
        AdvantageConfig(**{field: value})


def test_a_run_that_began_with_std_keeps_it_and_is_told():
    assert "kl.alpha does not weigh what it says" in (AdvantageConfig(scale="std").notice or "")
    assert AdvantageConfig().notice is None and AdvantageConfig(scale="group_std").notice is None


def signal(scores, baseline, per_sample):
    """Mean of advantage times score function, and its standard error over the groups, per sample."""
    count, size = per_sample.shape
    groups = torch.arange(count).repeat_interleave(size)
    estimator = AdvantageEstimator(AdvantageConfig(baseline=baseline, scale="none"))
    flat = scores.flatten()
    found = estimator(
        flat, groups, [""] * len(flat), kl=None, alpha=0.0, num_steps=1, compared=flat
    ).values  # fmt: skip
    means = (found.view(count, size).double() * per_sample).mean(1)
    return float(means.mean()), float(means.std()) / math.sqrt(count)


@pytest.mark.parametrize("baseline", ["group", "batch"])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_signal_of_a_diversity_is_the_gradient_of_the_mean_distance_of_pairs_whatever_the_group_size(
    size, baseline
):
    """x ~ N(0, s^2): E|x_i - x_j| = 2 s / sqrt(pi), and the scores d_i earn half its slope in log s each."""
    x = torch.randn(40_000, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    distances = (x[:, :, None] - x[:, None, :]).abs().sum(2) / (size - 1)
    mean, error = signal(distances, baseline, x.square() - 1)
    assert abs(mean - 1 / math.sqrt(math.pi)) < 4.5 * error
    assert error < 0.02


@pytest.mark.parametrize("baseline", ["group", "batch"])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_signal_of_a_rank_is_the_slope_of_the_chance_to_beat_one_other(size, baseline):
    """x ~ N(theta, 1) against others at theta' = theta: d/d theta P(x > x') = 1 / (2 sqrt(pi))."""
    x = torch.randn(40_000, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    ranks = (x[:, :, None] > x[:, None, :]).double().sum(2) / (size - 1)
    mean, error = signal(ranks, baseline, x)
    assert abs(mean - 0.5 / math.sqrt(math.pi)) < 4.5 * error
    assert error < 0.01


def test_only_the_part_that_compares_has_the_other_groups_for_its_baseline_and_one_group_is_refused():
    own, compared = torch.tensor([1.0, 3.0, 5.0, 9.0]), torch.tensor([0.5, 0.1, 0.2, 0.6])
    estimator = AdvantageEstimator(AdvantageConfig(scale="none"))

    def values(groups):
        return estimator(
            own + compared, torch.tensor(groups), [""] * 4, kl=None, alpha=0.0, num_steps=1, compared=compared
        ).values[:, 0]

    expected = torch.tensor([-2 + 0.5 - 0.4, 2 + 0.1 - 0.4, -4 + 0.2 - 0.3, 4 + 0.6 - 0.3])
    torch.testing.assert_close(values([0, 0, 1, 1]), expected)
    with pytest.raises(ValueError, match=r"at least two groups an epoch, got one: .* raise batch\.samples_per_epoch"):
        values([0, 0, 0, 0])
