"""Noises of a group that belong together: what is drawn, and what the baseline must then leave out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpo.control.diffusion.toy_problem import toy_problem
from ddpo.credit.advantages import AdvantageConfig, AdvantageEstimator
from ddpo.credit.baselines import leave_one_out, rarity
from ddpo.seeds import group_seeds, sample_seeds


@pytest.fixture(scope="module")
def policy():
    return toy_problem(dims=3).policy()


@pytest.mark.parametrize("kind", ["independent", "antithetic", "shared"])
def test_what_a_sample_is_drawn_from_does_not_depend_on_its_batch(kind):
    whole = group_seeds(kind, 5, 2, range(24), group_size=6)
    parts = [group_seeds(kind, 5, 2, range(start, start + 8), group_size=6) for start in (0, 8, 16)]
    for place in range(2):
        assert torch.equal(whole[place], torch.cat([part[place] for part in parts]))
    assert len(set(whole[0].tolist())) == 24, "every sample has noises of its own in its steps"


def test_the_noises_of_a_pair_are_opposite_in_the_first_state_and_all_steps(policy):
    seeds, priors = group_seeds("antithetic", 0, 0, range(8), group_size=4)
    noise = policy.noise(seeds)
    assert torch.equal(noise[1::2], -noise[::2]) and torch.equal(policy.prior(priors), noise[:, 0])
    assert torch.equal(noise[::2], policy.noise(sample_seeds(0, 0, range(0, 8, 2))))


def test_a_group_that_shares_its_start_differs_by_its_steps_alone(policy):
    seeds, priors = group_seeds("shared", 0, 0, range(8), group_size=4)
    own, _ = group_seeds("independent", 0, 0, range(8), group_size=4)
    assert torch.equal(seeds, own)
    starts = policy.prior(priors)
    assert torch.equal(starts, policy.noise(own)[[0, 0, 0, 0, 4, 4, 4, 4], 0])


@given(st.lists(st.floats(-100, 100, width=32), min_size=8, max_size=16).filter(lambda x: len(x) % 4 == 0))
def test_pairs_are_left_out_of_each_others_baseline(scores):
    values, places = torch.tensor(scores, dtype=torch.float64), torch.arange(len(scores))
    result = leave_one_out(values, places // 4, places // 2)
    for i, value in enumerate(scores):
        others = [scores[j] for j in range(len(scores)) if j // 4 == i // 4 and j // 2 != i // 2]
        assert math.isclose(float(result[i]), value - sum(others) / 2, rel_tol=1e-9, abs_tol=1e-9)


def test_a_pair_in_its_own_baseline_makes_the_gradient_longer_and_one_left_out_does_not():
    """r = x, x ~ N(0, 1) and its opposite: d E[r] / d mean is 1; with the pair in groups of four it is 4 / 3."""
    drawn = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.stack([drawn, -drawn], dim=2).flatten()
    places = torch.arange(len(x))

    def gradient(baseline):
        each = (baseline * x).reshape(-1, 4).mean(1)
        return float(each.mean()), float(each.std()) / math.sqrt(len(each))

    right, error = gradient(leave_one_out(x, places // 4, places // 2))
    assert abs(right - 1) < 4.5 * error
    wrong, error = gradient(leave_one_out(x, places // 4))
    assert abs(wrong - 4 / 3) < 4.5 * error


def test_sharing_the_start_takes_its_spread_out_of_the_gradients_variance():
    """One step x' = x + s z and r = x', pairs: the gradient by the mean has the variance 2 + var(x) / s^2, or 2."""
    generator = torch.Generator().manual_seed(0)
    count, s = 400_000, 0.5
    groups = torch.arange(2 * count) // 2
    z = torch.randn(2 * count, generator=generator, dtype=torch.float64)
    own = torch.randn(2 * count, generator=generator, dtype=torch.float64)
    for start, expected in ((own, 2 + 1 / s**2), (own[::2].repeat_interleave(2), 2.0)):
        each = (leave_one_out(start + s * z, groups) * z / s).reshape(-1, 2).mean(1)
        assert math.isclose(float(each.var()), expected, rel_tol=0.02)
        assert abs(float(each.mean()) - 1) < 4.5 * math.sqrt(expected / count)


def test_the_costs_of_a_pairs_kl_are_left_out_together_too():
    estimator = AdvantageEstimator(AdvantageConfig(baseline="batch", scale="none"))
    kl = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 5.0], [0.0, 9.0]])
    twins = torch.tensor([0, 0, 1, 1])
    found = estimator(torch.zeros(4), torch.zeros(4).long(), [""] * 4, kl=kl, alpha=1.0, num_steps=2, twins=twins)
    assert found.values[:, 0].tolist() == [-(1 - 7.0), -(3 - 7.0), -(5 - 2.0), -(9 - 2.0)]
    assert found.values[:, 1].tolist() == [0.0] * 4


# ---- diversity -------------------------------------------------------------------------------------------------------


def test_only_advantages_above_the_baseline_are_multiplied_by_rarity():
    """GARDO by hand: A_i = (R_i - mean of the others) (R_i below: 1, else d_i / mean d)."""
    estimator = AdvantageEstimator(AdvantageConfig(scale="none", diversity="d"))
    scores, distances = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 0.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    kl = torch.tensor([0.0, 0.3, 0.0, 0.0, 0.0, 0.0])[:, None].expand(6, 2)
    found = estimator(scores, groups, [""] * 6, kl=kl, alpha=1.0, num_steps=2, distances=distances)
    last = found.values[:, 1]
    torch.testing.assert_close(last, torch.tensor([1 - 4.0, 2 - 3.5, (6 - 1.5) * 3 / 2, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(found.values[:, 0] - last, torch.tensor([0.15, -0.3, 0.15, 0.0, 0.0, 0.0]))


def test_images_that_are_all_alike_are_all_as_rare():
    assert rarity(torch.zeros(4).double(), torch.tensor([0, 0, 1, 1])).tolist() == [1.0] * 4
