"""The training loop reaches the optimum that control theory knows, and with a common mistake in it, it does not."""

from dataclasses import replace

import pytest

from ddpo.control.diffusion.toy_problem import mixture_problem, toy_problem
from ddpo.sampling.samplers import SamplerConfig
from tests.ddpo.control.mutants import MUTANTS, applied, exact_gap
from trainers.verification.optimum import GAP_BAR, MIXTURE, PPO, REINFORCE, Recipe, affine_gap, mixture_gap


def problem(dims=2):
    return toy_problem(dims, sampler=SamplerConfig(num_steps=5, guidance_scale=1.0), seed=3)


def short(recipe: Recipe, **changes) -> Recipe:
    return replace(recipe, **{"samples_per_epoch": 1024, "epochs": 150, "learning_rate": 0.06, **changes})


@pytest.mark.parametrize("recipe", [REINFORCE, PPO], ids=["reinforce", "ppo"])
def test_the_trainer_reaches_the_closed_form_optimum(recipe):
    assert affine_gap(problem(), short(recipe)) < GAP_BAR


@pytest.mark.parametrize("name", ["future KL not in the return", "baseline includes the sample itself"])
def test_with_a_mistake_in_it_the_trainer_goes_where_the_mistake_leads(name):
    (mutant,) = [mutant for mutant in MUTANTS if mutant.name == name]
    predicted = exact_gap(mutant, problem())
    with applied(mutant):
        gap = affine_gap(problem(), short(REINFORCE, advantages=mutant.advantages))
    assert predicted > GAP_BAR
    assert gap > GAP_BAR
    assert gap == pytest.approx(predicted, rel=0.8)  # three seeds: .0045 to .0083 for .0050


def test_a_network_on_mixture_data_moves_towards_the_optimum_that_dynamic_programming_knows():
    gap = mixture_gap(mixture_problem(num_steps=5), short(MIXTURE, epochs=80, learning_rate=0.01))
    assert 0 < gap < 0.1
