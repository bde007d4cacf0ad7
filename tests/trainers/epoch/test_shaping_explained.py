"""What shaping explains is what it takes off the variance of advantages, not what prompts differ by on the whole."""

import math

import pytest
import torch

from ddpo.credit.advantages import AdvantageConfig, AdvantageEstimator
from trainers.epoch.credit import explained


def drawn():
    """Scores of 64 prompts of very different levels, eight images each, and a guess of half of what is left."""
    generator = torch.Generator().manual_seed(0)
    level = 10 * torch.randn(64, generator=generator).repeat_interleave(8)
    own, guess = torch.randn(512, generator=generator), torch.randn(512, generator=generator)
    return level + own + guess, level, guess, torch.arange(64).repeat_interleave(8)


@pytest.mark.parametrize("baseline", ["group", "batch"])
def test_it_is_the_share_of_the_advantages_variance_that_goes(baseline):
    scores, level, guess, groups = drawn()
    estimator = AdvantageEstimator(AdvantageConfig(baseline=baseline, scale="none"))
    for values in (level, guess, level + guess):
        potential = values[:, None]
        plain, shaped = (
            estimator(scores, groups, [""] * 512, kl=None, alpha=0.0, num_steps=1, potential=phi).values.double()
            for phi in (None, potential)
        )
        expected = 1 - float(shaped.square().mean() / plain.square().mean())
        found = explained(scores, potential, estimator.population(groups))
        assert found == pytest.approx(expected, abs=1e-4)


def test_a_guess_of_the_prompts_level_explains_nothing_that_a_groups_baseline_leaves():
    scores, level, guess, groups = drawn()
    assert explained(scores, level[:, None], groups) == pytest.approx(0, abs=1e-5)
    assert explained(scores, level[:, None], torch.zeros_like(groups)) > 0.95
    assert explained(scores, guess[:, None], groups) == pytest.approx(0.5, abs=0.1)


def test_without_a_potential_or_variance_it_is_not_a_number():
    groups = torch.zeros(4, dtype=torch.int64)
    assert math.isnan(explained(torch.randn(4), None, groups))
    assert math.isnan(explained(torch.ones(4), torch.ones(4, 1), groups))
