"""The entropy of a chain against that of its joint Gaussian law, which knows nothing of steps."""

import math

import pytest
import torch

from ddpo import Gaussian
from ddpo.control.checks.shared_head import DDIM, DDIM_NOISY, FLOW_NOISY
from ddpo.control.diffusion.chain import AffineChain, marginal_entropies
from ddpo.control.diffusion.gradient_check import draw_paths
from ddpo.control.diffusion.toy_problem import toy_problem
from ddpo.sampling.entropy import path_entropy, step_entropies


def joint_covariance(chain: AffineChain, last: int) -> torch.Tensor:
    """Of (x_0, .., x_last): every state is a linear map of the prior's and the steps' noise."""
    dims = len(chain.prior_mean)
    maps = [torch.eye(dims, dtype=torch.float64)]
    blocks = [chain.prior_cov, *chain.cov[:last]]
    noise = torch.block_diag(*blocks)
    rows = [torch.cat([maps[0], torch.zeros(dims, dims * last, dtype=torch.float64)], dim=1)]
    for k in range(last):
        row = chain.F[k] @ rows[-1]
        row[:, dims * (k + 1) : dims * (k + 2)] += torch.eye(dims, dtype=torch.float64)
        rows.append(row)
    states = torch.cat(rows)
    return states @ noise @ states.T


@pytest.mark.parametrize("sampler", [DDIM_NOISY, FLOW_NOISY, DDIM], ids=["ddim", "flow_sde", "noise-free end"])
def test_the_path_entropy_is_that_of_the_joint_law_before_and_after_training(sampler):
    problem = toy_problem(dims=2, sampler=sampler, head="shared")
    paths = draw_paths(problem, num_paths=2, chunk_size=2)
    noisy = len(problem.schedule.stochastic_steps)
    for chain in (problem.reference, problem.chain(paths.gain, paths.shift)):
        exact = 0.5 * torch.logdet(2 * math.pi * math.e * joint_covariance(chain, noisy))
        assert path_entropy(problem.schedule, num_dims=2) == pytest.approx(float(exact), rel=1e-8)


def test_training_moves_the_entropy_of_the_end_alone():
    problem = toy_problem(dims=2, head="shared")
    paths = draw_paths(problem, num_paths=2, chunk_size=2)
    before, after = (marginal_entropies(c) for c in (problem.reference, problem.chain(paths.gain, paths.shift)))
    assert before[0] == after[0] and abs(before[-1] - after[-1]) > 0.01
    law = torch.distributions.MultivariateNormal(torch.zeros(2).double(), problem.reference.prior_cov)
    assert float(before[0]) == pytest.approx(float(law.entropy()))


def test_a_steps_entropy_is_the_normal_distributions_and_minus_infinity_without_noise():
    schedule = toy_problem(dims=3).schedule
    found = step_entropies(schedule, num_dims=3)
    for k in schedule.stochastic_steps:
        law = torch.distributions.Normal(torch.zeros(3).double(), schedule.std[k])
        assert float(found[k]) == pytest.approx(float(law.entropy().sum()))
        step = Gaussian(mean=torch.zeros(4, 3), std=schedule.std[k])
        torch.testing.assert_close(step.entropy(), law.entropy().sum().expand(4))
    assert found[-1] == -math.inf
