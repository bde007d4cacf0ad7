"""The exact chain against simulation, scipy, finite differences and its own identities."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import torch

from ddpo.control.checks.chain import CHECKS, random_head
from ddpo.control.diffusion import chain as exact
from ddpo.control.diffusion.chain import (
    controlled,
    gaussian_data_chain,
    gaussian_kl,
    initial_value_bias,
    marginals,
    objective,
    optimum,
    quadratic,
    relative_gap,
    step_kls,
)
from ddpo.control.diffusion.toy_pipeline import toy_schedule
from ddpo.control.diffusion.toy_problem import toy_problem
from ddpo.sampling.samplers import SamplerConfig

SAMPLERS = [
    SamplerConfig(num_steps=5, guidance_scale=1.0),
    SamplerConfig(num_steps=5, eta=0.5, guidance_scale=1.0),
    SamplerConfig(kind="flow_sde", num_steps=5, eta=0.7, guidance_scale=1.0),
]


def small(sampler=SAMPLERS[0], alpha=0.4, kind="quadratic", dims=2):
    return toy_problem(dims, kind=kind, alpha=alpha, sampler=sampler, seed=3)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_checks_pass(check):
    for measured in check.run():
        assert measured.passed, measured


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{s.kind}-{s.eta}")
def test_exact_objective_is_the_mean_over_simulated_paths(sampler):
    problem = small(sampler)
    gain, shift = random_head(2, 5)
    chain = problem.chain(gain, shift)
    generator = torch.Generator().manual_seed(0)
    count = 100_000
    x = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    total = torch.zeros(count, dtype=torch.float64)
    for k in range(5):
        std = chain.cov[k, 0, 0].sqrt()
        if std > 0:
            control = x @ gain[k].T + shift[k]
            total -= problem.alpha * 0.5 * control.square().sum(1)
        x = x @ chain.F[k].T + chain.g[k] + std * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    total += problem.reward(x)
    error = total.mean() - problem.value(gain, shift)
    assert abs(error) < 4 * total.std() / count**0.5


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{s.kind}-{s.eta}")
@pytest.mark.parametrize("alpha", [0.4, 1.0, 3.0])
def test_riccati_optimum_is_what_scipy_finds_by_ascent(sampler, alpha):
    problem = small(sampler, alpha)
    shapes = [(5, 2, 2), (5, 2)]
    split = int(np.prod(shapes[0]))

    def negative(vector):
        weights = torch.tensor(vector, requires_grad=True)
        value = problem.value(weights[:split].reshape(shapes[0]), weights[split:].reshape(shapes[1]))
        (slope,) = torch.autograd.grad(value, weights)
        return -float(value.detach()), -slope.numpy()

    found = scipy.optimize.minimize(
        negative, np.zeros(split + 10), jac=True, method="L-BFGS-B", options={"ftol": 1e-15}
    )
    assert -found.fun == pytest.approx(problem.optimum.objective, abs=1e-6)
    assert -found.fun <= problem.optimum.objective + 1e-12


@pytest.mark.parametrize("alpha", [0.4, 2.0])
def test_gaussian_problems_have_the_same_optimal_means_with_free_and_with_fixed_noise(alpha):
    problem = small(alpha=alpha)
    free = optimum(problem.reference, problem.reward, alpha, free_covariance=True)
    torch.testing.assert_close(free.chain.F, problem.optimum.chain.F)
    torch.testing.assert_close(free.chain.g, problem.optimum.chain.g)
    assert free.objective > problem.optimum.objective


@pytest.mark.parametrize("alpha", [0.4, 2.0])
def test_soft_value_is_alpha_log_mean_exp_of_the_reward(alpha):
    """Against simulation of the reference from one state, for a linear reward, where the tails are benign."""
    problem = small(alpha=alpha, kind="linear")
    soft = optimum(problem.reference, problem.reward, alpha, free_covariance=True)
    x = torch.tensor([[0.3, -0.5]], dtype=torch.float64).expand(200_000, 2)
    start = soft.values[0](x[:1])
    generator = torch.Generator().manual_seed(0)
    for k in range(5):
        x = x @ problem.reference.F[k].T + problem.reference.g[k]
        x = x + problem.reference.cov[k, 0, 0].sqrt() * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    weights = (problem.reward(x) / alpha).exp()
    estimate, error = weights.mean(), weights.std() / len(weights) ** 0.5
    assert abs(float(estimate - (start / alpha).exp())) < 4 * float(error)


def test_verification_identity_holds_for_the_sampled_policy_and_fails_with_the_wrong_alpha():
    problem = small()
    chain = problem.chain(*random_head(2, 5))
    value = float(objective(chain, problem.reference, problem.reward, 0.4))
    for alpha, holds in ((0.4, True), (0.8, False)):
        soft = optimum(problem.reference, problem.reward, alpha, free_covariance=True)
        identity = soft.objective - alpha * float(step_kls(chain, soft.chain).sum())
        assert (abs(identity - value) < 1e-10) == holds


def test_exact_gradient_equals_finite_differences():
    problem = small()
    gain, shift = random_head(2, 5)
    torch.autograd.gradcheck(problem.value, (gain.requires_grad_(), shift.requires_grad_()), atol=1e-6)


def test_initial_value_bias_vanishes_at_eta_one_and_grows_as_noise_falls():
    reward = quadratic(torch.tensor([[2.0]]), torch.tensor([-1.0]))
    biases = []
    for eta in (1.0, 0.7, 0.5, 0.2):
        schedule = toy_schedule(SamplerConfig(num_steps=50, eta=eta, guidance_scale=1.0))[1]
        reference = gaussian_data_chain(torch.tensor([1.0]), torch.tensor([[0.25]]), schedule)
        biases.append(initial_value_bias(reference, reward, 0.5)[0])
    assert biases[0] < 1e-9
    assert biases == sorted(biases)
    assert biases[-1] > 0.5


def test_gaussian_kl_is_that_of_torch_distributions():
    mean, other = torch.tensor([0.3, -1.0]).double(), torch.tensor([1.0, 0.5]).double()
    cov = torch.tensor([[1.0, 0.3], [0.3, 0.5]]).double()
    wide = torch.tensor([[2.0, -0.4], [-0.4, 1.5]]).double()
    p = torch.distributions.MultivariateNormal(mean, cov)
    q = torch.distributions.MultivariateNormal(other, wide)
    assert gaussian_kl(mean, cov, other, wide) == pytest.approx(float(torch.distributions.kl_divergence(p, q)))


def test_step_kls_with_other_covariances_are_those_of_torch_distributions():
    problem = small()
    soft = optimum(problem.reference, problem.reward, 0.4, free_covariance=True).chain
    means, covs = marginals(problem.reference)
    kls = step_kls(problem.reference, soft)
    x = torch.distributions.MultivariateNormal(means[2], covs[2]).sample((20_000,))
    p = torch.distributions.MultivariateNormal(x @ problem.reference.F[2].T + problem.reference.g[2],
                                               problem.reference.cov[2])  # fmt: skip
    q = torch.distributions.MultivariateNormal(x @ soft.F[2].T + soft.g[2], soft.cov[2])
    sampled = torch.distributions.kl_divergence(p, q)
    assert abs(float(sampled.mean() - kls[2])) < 4 * float(sampled.std()) / len(x) ** 0.5


def test_a_reward_that_alpha_cannot_hold_back_is_refused():
    problem = small()
    convex = quadratic(-50 * torch.eye(2), torch.zeros(2))
    with pytest.raises(ValueError, match="raise alpha or lower the reward's curvature"):
        optimum(problem.reference, convex, 0.4)
    with pytest.raises(ValueError, match="alpha must be positive, got 0"):
        optimum(problem.reference, problem.reward, 0.0)


def test_relative_gap_is_one_at_the_start_and_zero_at_the_optimum():
    assert relative_gap(1.0, 3.0, 1.0) == 1.0
    assert relative_gap(3.0, 3.0, 1.0) == 0.0
    with pytest.raises(ValueError, match="above the start"):
        relative_gap(1.0, 1.0, 1.0)


def test_controls_move_the_means_by_stds():
    problem = small()
    gain, shift = random_head(2, 5)
    chain = controlled(problem.reference, gain, shift)
    kls = step_kls(chain, problem.reference)
    means, covs = marginals(chain)
    for k in range(4):
        mean = gain[k] @ means[k] + shift[k]
        spread = gain[k] @ covs[k] @ gain[k].T
        assert float(kls[k]) == pytest.approx(0.5 * float(mean @ mean + spread.trace()))
    assert float(kls[4]) == 0.0  # DDIM's last step has no noise


def test_objective_at_zero_control_is_the_reward_of_the_pretrained_chain():
    problem = small()
    still = replace(problem.reference)
    means, covs = marginals(still)
    reward = problem.reward.expectation(means[-1], covs[-1])
    assert float(objective(still, problem.reference, problem.reward, 0.4)) == pytest.approx(float(reward))
    assert exact.step_kls(still, still).abs().max() == 0
