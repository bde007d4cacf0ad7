"""GDPO's advantages against a plain reading of the paper's formulas in numpy."""

import numpy as np
import pytest
import torch

from ddpo.credit.advantages import AdvantageConfig, AdvantageEstimator, Part
from ddpo.validation import FieldError


def estimate(parts, groups):
    scores = sum(weight * raw for weight, raw in parts)
    estimator = AdvantageEstimator(AdvantageConfig(combination="gdpo", scale="group_std"))
    size = len(groups)
    given = [Part(weight, torch.as_tensor(raw)) for weight, raw in parts]
    return estimator(
        torch.as_tensor(scores), torch.as_tensor(groups), [""] * size, kl=None, alpha=0.0, num_steps=2, parts=given
    )


def by_the_paper(parts, groups):
    total = np.zeros(len(groups))
    for weight, raw in parts:
        own = np.zeros(len(groups))
        for group in set(groups.tolist()):
            rows = groups == group
            deviation = raw[rows].std()
            own[rows] = (raw[rows] - raw[rows].mean()) / deviation if deviation > 1e-6 else 0.0
        total += weight * own
    return (total - total.mean()) / total.std()


def test_advantages_are_the_papers_group_then_batch_normalisation():
    rng = np.random.default_rng(0)
    groups = np.arange(24) // 6
    parts = [(1.0, rng.normal(size=24)), (0.5, 1000 * rng.random(24)), (-2.0, rng.normal(size=24) ** 3)]
    result = estimate(parts, groups)
    np.testing.assert_allclose(result.values[:, 0].numpy(), by_the_paper(parts, groups), rtol=1e-5)
    assert (result.values[:, 0] == result.values[:, 1]).all()


def test_samples_of_equal_sum_get_different_advantages_where_their_parts_differ():
    """Two binary rewards: (0, 1) and (1, 0) have one sum, but the rarer success stands out more."""
    first, second = np.array([0.0, 1, 0, 0]), np.array([1.0, 0, 1, 1])
    groups = np.zeros(4, dtype=np.int64)
    sums = AdvantageEstimator(AdvantageConfig(clip=None))(
        torch.as_tensor(first + second), torch.as_tensor(groups), [""] * 4, kl=None, alpha=0.0, num_steps=1
    )
    assert sums.values.eq(0).all()
    result = estimate([(1.0, first), (0.5, second)], groups)
    assert result.values[1, 0] > 0 > result.values[0, 0]


def test_the_unit_of_a_reward_does_not_matter():
    rng = np.random.default_rng(1)
    groups, one, two = np.arange(16) // 4, rng.normal(size=16), rng.normal(size=16)
    plain = estimate([(1.0, one), (1.0, two)], groups).values
    scaled = estimate([(1.0, one), (1.0, 50 * two + 7)], groups).values
    torch.testing.assert_close(plain, scaled, rtol=1e-4, atol=1e-5)


def test_a_reward_without_variance_in_a_group_leaves_the_others_signal():
    groups = np.arange(8) // 4
    flat, varied = np.array([1.0] * 4 + [0, 1, 2, 3]), np.array([3.0, 1, 2, 0] * 2)
    result = estimate([(1.0, flat), (1.0, varied)], groups)
    assert result.zero_variance_groups == 0
    assert np.argmax(result.values[:4, 0].numpy()) == 0
    assert estimate([(1.0, flat), (1.0, flat)], groups).zero_variance_groups == 1


def test_gdpo_refuses_a_running_baseline_and_missing_parts():
    with pytest.raises(FieldError, match="combination must be sum"):
        AdvantageConfig(combination="gdpo", baseline="prompt")
    with pytest.raises(ValueError, match="raw scores of each reward"):
        estimator = AdvantageEstimator(AdvantageConfig(combination="gdpo"))
        estimator(torch.zeros(2), torch.zeros(2, dtype=torch.int64), ["", ""], kl=None, alpha=0.0, num_steps=1)
