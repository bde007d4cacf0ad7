"""Dynamic programming on a grid against the Riccati recursion, simulation, and itself at another resolution."""

from dataclasses import replace

import pytest
import torch

from ddpo.control.diffusion.grid_chain import make_grid
from ddpo.control.diffusion.toy_problem import mixture_problem, step_means
from ddpo.rollout import rollout
from ddpo.seeds import sample_seeds


def test_value_of_a_network_is_the_mean_over_its_rollouts():
    problem = mixture_problem()
    policy = problem.policy(seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        head = policy.trainable()["head.leave.weight"]
        head.copy_(0.2 * torch.randn(head.shape, generator=generator))
    count = 20_000
    prompts = [""] * count
    path = rollout(policy, policy.encode(prompts), sample_seeds(0, 0, range(count)), with_kl=True)
    total = problem.score(policy.decode(path.final), prompts, []) - problem.alpha * path.kl.sum(1)
    assert abs(float(total.mean()) - problem.value(policy)) < 4 * float(total.std()) / count**0.5


def test_no_policy_earns_more_than_the_optimum_and_the_optimum_less_than_the_soft_value():
    problem = mixture_problem()
    best, means = problem.chain.optimum()
    assert problem.chain.value(problem.chain.reference) < best < problem.chain.soft_optimum()
    for bump in (-1e-3, 1e-3):

        def bumped(k, x, bump=bump):
            return means[k] + bump if k < len(means) else problem.chain.reference(k, x)

        assert problem.chain.value(bumped) < best


def test_optima_do_not_depend_on_the_grid():
    problem = mixture_problem()
    policy = problem.policy()
    fine = replace(problem.chain, grid=make_grid(problem.chain.std / 2, reach=11.0))
    fine = replace(fine, reference=lambda k, x: step_means(policy, k, x))
    assert fine.optimum()[0] == pytest.approx(problem.chain.optimum()[0], abs=1e-7)  # the policy's float32
    assert fine.soft_optimum() == pytest.approx(problem.chain.soft_optimum(), abs=1e-7)
