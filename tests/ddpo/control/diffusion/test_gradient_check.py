"""The gradient check passes for our code, and each common mistake is flagged by the check that is said to flag it."""

import pytest

from ddpo.control.checks.gradient import MAX_BAR, RMS_BAR, gradients
from ddpo.control.diffusion.gradient_check import compare_gradients, draw_paths
from ddpo.control.diffusion.toy_problem import toy_problem
from ddpo.sampling.samplers import SamplerConfig
from tests.ddpo.control.mutants import MUTANTS, PLAIN, REINFORCE, Z_BAR, exact_gap, gradient_of
from trainers.verification.optimum import GAP_BAR

BY_GRADIENT = [mutant for mutant in MUTANTS if mutant.check == "gradient"]
CONVERGING = [mutant for mutant in MUTANTS if mutant.converged is not None]


@pytest.fixture(scope="module")
def paths():
    return draw_paths(toy_problem())


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
def test_every_objective_has_the_exact_gradient_on_flow_chains(kind):
    sampler = SamplerConfig(kind=kind, num_steps=10, eta=0.6, guidance_scale=1.0)
    for measured in gradients(sampler, num_paths=40_000)():
        assert measured.passed, measured


def test_reinforce_has_the_exact_gradient(paths):
    found = compare_gradients(paths, REINFORCE, PLAIN)
    assert found.rms_z < RMS_BAR
    assert found.max_z < MAX_BAR


@pytest.mark.parametrize("mutant", BY_GRADIENT, ids=lambda mutant: mutant.name)
def test_the_gradient_check_flags(mutant, paths):
    assert gradient_of(mutant, paths).rms_z > Z_BAR


@pytest.mark.parametrize("mutant", CONVERGING, ids=lambda mutant: mutant.name)
def test_the_optimum_of_the_mistake_is_off(mutant):
    assert exact_gap(mutant, toy_problem()) > GAP_BAR


def test_a_mistake_that_the_gradient_check_is_not_said_to_flag_moves_the_optimum():
    others = [mutant for mutant in MUTANTS if mutant not in BY_GRADIENT]
    assert others and [mutant.name for mutant in others if not (exact_gap(mutant, toy_problem()) or 0) > GAP_BAR] == []


def test_a_linear_reward_hides_that_future_kl_is_missing():
    """Why the problems have a quadratic reward: with a linear one the mistake does not move the optimum at all."""
    (mutant,) = [mutant for mutant in MUTANTS if mutant.name == "future KL not in the return"]
    assert exact_gap(mutant, toy_problem(kind="linear")) < 1e-12
    assert exact_gap(mutant, toy_problem(kind="quadratic")) > 0.01
