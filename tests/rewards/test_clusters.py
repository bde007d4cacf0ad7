"""The standard error of a mean over clusters against textbook formulas and simulation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards.clusters import standard_error


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20))
def test_of_independent_draws_it_is_the_usual_one(values):
    drawn = torch.tensor(values, dtype=torch.float64)
    usual = float(drawn.std(correction=1)) / math.sqrt(len(values))
    for clusters in (None, torch.arange(len(values)), torch.zeros(len(values), dtype=torch.int64)):
        assert standard_error(drawn, clusters) == pytest.approx(usual, rel=1e-9, abs=1e-9)


def test_of_equally_many_draws_a_cluster_it_is_that_of_the_clusters_means_in_any_order():
    values = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clusters = torch.arange(12).repeat_interleave(5)
    expected = float(values.mean(1).std(correction=1)) / math.sqrt(12)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert standard_error(values.flatten()[order], clusters[order]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("correlation", [0.24, 0.64])
def test_it_is_the_spread_of_means_over_new_captions_and_the_usual_one_is_too_small(correlation):
    """Four pictures of each of 64 captions, 400 times: sqrt(1 + 3 rho) is 1.31 and 1.71."""
    generator, clusters = torch.Generator().manual_seed(0), torch.arange(64).repeat_interleave(4)
    means, errors, usual = [], [], []
    for _ in range(400):
        common = torch.randn(64, generator=generator, dtype=torch.float64)[clusters]
        own = torch.randn(256, generator=generator, dtype=torch.float64)
        values = math.sqrt(correlation) * common + math.sqrt(1 - correlation) * own
        means.append(float(values.mean()))
        errors.append(standard_error(values, clusters))
        usual.append(standard_error(values))
    spread = float(torch.tensor(means).std())
    assert sum(errors) / 400 == pytest.approx(spread, rel=0.1)
    assert spread / (sum(usual) / 400) == pytest.approx(math.sqrt(1 + 3 * correlation), rel=0.1)


def test_a_single_value_has_none():
    assert standard_error(torch.tensor([1.0])) is None
