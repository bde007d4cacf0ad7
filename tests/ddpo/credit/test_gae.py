"""Generalised advantages: against the sum that defines them, and what they become at the ends of lambda."""

import pytest
import torch

from ddpo.credit.advantages import AdvantageConfig, AdvantageEstimator, Expected
from ddpo.credit.baselines import cost_to_go, leave_one_out
from ddpo.credit.gae import explained_variance, generalised_advantages, returns
from ddpo.validation import FieldError

B, T = 6, 5
GENERATOR = torch.Generator().manual_seed(0)
FINAL, EARNED, VALUES, KL = (
    torch.randn(*shape, generator=GENERATOR, dtype=torch.float64) for shape in ((B,), (B, T), (B, T), (B, T))
)
DECISIONS = torch.tensor([True, False, True, True, False])


def by_definition(gae_lambda: float, decisions: torch.Tensor) -> torch.Tensor:
    after = torch.cat([VALUES[:, 1:], FINAL[:, None]], 1)
    result = torch.zeros(B, T, dtype=torch.float64)
    for k in range(T):
        for j in range(k, T):
            decay = gae_lambda ** int(decisions[k + 1 : j + 1].sum())
            result[:, k] += decay * (EARNED[:, j] + after[:, j] - VALUES[:, j])
    return result


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("decisions", [DECISIONS, torch.ones(T, dtype=torch.bool)], ids=["some noise", "all noise"])
def test_advantages_are_the_decayed_sum_of_the_surprises(gae_lambda: float, decisions: torch.Tensor) -> None:
    found = generalised_advantages(FINAL, EARNED, VALUES, gae_lambda=gae_lambda, decisions=decisions)
    torch.testing.assert_close(found, by_definition(gae_lambda, decisions))


def test_at_lambda_one_they_are_what_was_earned_less_what_was_expected() -> None:
    found = generalised_advantages(FINAL, EARNED, VALUES, gae_lambda=1.0, decisions=DECISIONS)
    torch.testing.assert_close(found, returns(FINAL, EARNED) - VALUES)
    torch.testing.assert_close(returns(FINAL, EARNED)[:, 1], FINAL + EARNED[:, 1:].sum(1))


def test_heads_are_estimated_side_by_side() -> None:
    parts = [torch.stack([x, 2 * x], -1) for x in (FINAL, EARNED, VALUES)]
    found = generalised_advantages(*parts, gae_lambda=0.7, decisions=DECISIONS)
    alone = generalised_advantages(FINAL, EARNED, VALUES, gae_lambda=0.7, decisions=DECISIONS)
    torch.testing.assert_close(found, torch.stack([alone, 2 * alone], -1))


def test_a_critic_that_knows_the_returns_explains_all_of_their_variance_and_a_constant_none() -> None:
    found = returns(FINAL, EARNED)
    torch.testing.assert_close(explained_variance(found, found), torch.ones(T, dtype=torch.float64))
    constant = found.mean(0).expand_as(found)
    torch.testing.assert_close(explained_variance(found, constant), torch.zeros(T, dtype=torch.float64))
    assert (explained_variance(found, constant + 1) < 0).all(), "a constant error counts"
    assert explained_variance(torch.ones(B, T), torch.ones(B, T)).isnan().all()


def estimated(*, baseline: str, values: torch.Tensor | None, groups: torch.Tensor, **options: object) -> torch.Tensor:
    estimator = AdvantageEstimator(AdvantageConfig(baseline=baseline, scale="none", **options))
    expected = None if values is None else Expected(values=values, decisions=DECISIONS)
    return estimator(FINAL, groups, ["p"] * B, kl=KL.abs(), alpha=0.3, num_steps=T, expected=expected)


def test_with_a_critic_the_kl_of_the_steps_after_is_bootstrapped() -> None:
    groups = torch.arange(B) // 2
    found = estimated(baseline="critic", values=VALUES, groups=groups, gae_lambda=1.0)
    from_here = cost_to_go(KL.abs(), 0.3) + 0.3 * KL.abs()
    torch.testing.assert_close(found.values, (FINAL[:, None] - from_here - VALUES).float())
    against_group = leave_one_out(FINAL[:, None] - cost_to_go(KL.abs(), 0.3), groups)[:, DECISIONS]
    ratio = found.values[:, DECISIONS].double().square().mean() / against_group.square().mean()
    assert found.variance_ratio == pytest.approx(float(ratio), rel=1e-6)
    half = estimated(baseline="critic", values=VALUES, groups=groups, gae_lambda=0.5)
    after = torch.cat([VALUES[:, 1:], FINAL[:, None]], 1)
    deltas = after - VALUES - 0.3 * KL.abs()
    torch.testing.assert_close(half.values[:, 3], (deltas[:, 3] + deltas[:, 4]).float())
    torch.testing.assert_close(half.values[:, 2], (deltas[:, 2] + 0.5 * (deltas[:, 3] + deltas[:, 4])).float())


@pytest.mark.parametrize(("size", "instead"), [(2, "group"), (1, "batch")])
def test_until_a_critic_is_warm_samples_are_compared_with_each_other(size: int, instead: str) -> None:
    groups = torch.arange(B) // size
    found = estimated(baseline="critic", values=None, groups=groups)
    other = estimated(baseline=instead, values=None, groups=groups)
    assert torch.equal(found.values, other.values) and found.variance_ratio is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "group", "gae_lambda": 0.5}, "gae_lambda must be null without baseline: critic"),
        ({"baseline": "critic", "gae_lambda": 1.5}, r"gae_lambda must be in \[0, 1\]"),
        ({"baseline": "critic", "combination": "gdpo"}, "combination must be sum with baseline: critic"),
        ({"baseline": "critic", "diversity": "distance"}, "diversity must be null with baseline: critic"),
    ],
)
def test_what_makes_no_sense_together_is_refused(options: dict, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        AdvantageConfig(**options)
