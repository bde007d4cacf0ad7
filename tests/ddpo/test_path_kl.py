"""The path KL from few sites against the KL at every step of every sample."""

import math
from dataclasses import replace

import pytest
import torch

from ddpo import Keep, path_kl, rollout
from ddpo.path_kl import draw_sites, estimated_path_kl, path_kl_estimate, visit_kl
from ddpo.trajectory import Sites
from tests.ddpo.tools import PROMPTS, counting_calls, make_policy, perturb

SEEDS = torch.arange(4)


@pytest.fixture(scope="module")
def policy():
    made = make_policy(num_steps=5, guidance_scale=3.0)
    perturb(made)
    return made


def spread(num_samples, schedule, generator):
    """KL of each sample and step, (N, T), of very different size at different steps."""
    size = torch.logspace(-2, 1, schedule.num_steps, dtype=torch.float64)
    shape = (num_samples, schedule.num_steps)
    return size * torch.rand(shape, generator=generator, dtype=torch.float64).square() * schedule.stochastic


@pytest.mark.parametrize("recorded", [False, True], ids=["guided", "conditional"])
def test_the_kl_at_a_visit_is_the_path_kls_entry_at_one_row_of_the_pretrained_network(policy, recorded):
    trained = policy.conditional if recorded else policy
    every = torch.cartesian_prod(torch.arange(4), torch.arange(5))
    sites = Sites(rows=every[::3, 0], steps=every[::3, 1])
    path = rollout(policy, policy.encode(PROMPTS), SEEDS, recorded=trained, keep=Keep.FINAL, sites=sites)
    whole = path_kl(trained, rollout(policy, path.condition, SEEDS))
    with counting_calls(policy.denoiser.module) as calls:
        kl = visit_kl(trained, path, batch_size=3)
    assert len(calls) == math.ceil(len(sites.rows) / 3)
    order = path.visits.sites
    torch.testing.assert_close(kl, whole[order.rows, order.steps], rtol=1e-3, atol=1e-4)
    with counting_calls(policy.denoiser.module) as calls:
        assert torch.equal(visit_kl(trained, path, batch_size=3, num_calls=5), kl)
    assert len(calls) == 5
    estimate = estimated_path_kl(trained, path, batch_size=3)
    assert estimate.mean == pytest.approx(sum(float(kl[order.steps == k].mean()) for k in range(5)))
    assert estimate.standard_error > 0


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3], ids=["3 sites for 5 steps", "30 sites", "90 sites"])
@pytest.mark.parametrize("window", [False, True], ids=["all steps", "two of the steps"])
def test_the_estimate_is_unbiased(policy, share, window):
    schedule = policy.schedule
    if window:
        stochastic = torch.tensor([True, False, False, True, False])
        schedule = replace(schedule, stochastic=stochastic)
    kl = spread(60, schedule, torch.Generator().manual_seed(0))
    estimates = []
    for seed in range(1500):
        sites = draw_sites(60, schedule, share=share, seed=seed)
        estimates.append(path_kl_estimate(kl[sites.rows, sites.steps], sites.steps, schedule).mean)
    estimates = torch.tensor(estimates)
    exact = float(kl.sum(1).mean())
    error = float(estimates.std()) / math.sqrt(len(estimates))
    assert 0 < error < 0.05 * exact
    assert abs(float(estimates.mean()) - exact) < 4 * error


@pytest.mark.parametrize("num_samples", [100, 400])
def test_the_standard_error_is_the_spread_of_estimates_over_fresh_samples(policy, num_samples):
    generator, means, errors = torch.Generator().manual_seed(0), [], []
    for seed in range(1500):
        kl = spread(num_samples, policy.schedule, generator)
        sites = draw_sites(num_samples, policy.schedule, share=0.03, seed=seed)
        estimate = path_kl_estimate(kl[sites.rows, sites.steps], sites.steps, policy.schedule)
        means.append(estimate.mean)
        errors.append(estimate.standard_error**2)
    assert float(torch.tensor(errors).mean()) == pytest.approx(float(torch.tensor(means).var()), rel=0.15)


@pytest.mark.parametrize("budget", [2, 3, 4, 5, 7, 9, 15, 40])
def test_two_sites_or_more_know_the_last_step_and_have_an_error(policy, budget):
    """Whatever their number: the error of one site a step is no less than the true one, in the mean."""
    schedule, samples = policy.schedule, 40
    generator = torch.Generator().manual_seed(1)
    means, squares = [], []
    for seed in range(300):
        kl = spread(samples, schedule, generator)
        sites = draw_sites(samples, schedule, share=budget / (samples * 5) + 1e-9, seed=seed)
        assert len(sites.rows) == budget and (sites.steps == 4).any()
        estimate = path_kl_estimate(kl[sites.rows, sites.steps], sites.steps, schedule)
        means.append(estimate.mean)
        squares.append(estimate.standard_error**2)
        assert estimate.freedom >= 1
    assert sum(squares) / len(squares) > 0.85 * float(torch.tensor(means).var())


def test_the_sites_are_all_different_a_third_of_them_at_the_last_step_and_at_most_their_share(policy):
    sites = draw_sites(256, policy.schedule, share=0.03, seed=0)
    pairs = set(zip(sites.rows.tolist(), sites.steps.tolist(), strict=True))
    assert len(pairs) == len(sites.rows) == 38 == int(0.03 * 256 * 5)  # no image twice, by this seed
    assert torch.bincount(sites.steps).tolist() == [6, 6, 6, 7, 13]
    for k in range(5):  # one in each piece of the images
        rows = sites.rows[sites.steps == k]
        assert (rows * len(rows) // 256).tolist() == list(range(len(rows)))
    assert not torch.equal(draw_sites(256, policy.schedule, share=0.03, seed=1).rows, sites.rows)
    assert len(draw_sites(2, policy.schedule, share=0.03, seed=0).rows) == 1, "one at least"
    assert len(draw_sites(2, policy.schedule, share=1.0, seed=0).rows) == 10, "and no more than there are"
    assert len(draw_sites(2, policy.noise_free.schedule, seed=0).rows) == 0


def test_steps_that_were_not_visited_are_nan_and_deterministic_ones_0(policy):
    schedule = replace(policy.schedule, stochastic=torch.tensor([True, False, True, False, False]))
    estimate = path_kl_estimate(torch.tensor([2.0]), torch.tensor([2]), schedule)
    assert (estimate.mean, estimate.standard_error) == (4.0, None)
    assert torch.equal(estimate.per_step[1:], torch.tensor([0.0, 2.0, 0.0, 0.0]).double())
    assert estimate.per_step[0].isnan()
    ode = path_kl_estimate(torch.zeros(0), torch.zeros(0).long(), policy.noise_free.schedule)
    assert (ode.mean, ode.standard_error) == (0.0, 0.0)
