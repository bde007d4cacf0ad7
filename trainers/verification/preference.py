"""Preferences through the whole trainer: on a chain whose rewards are exact, online pairs raise them.

    share = (E r - E r_ref) / (E r_* - E r_ref)

with E r of the exported weights computed exactly (`ddpo.control.diffusion.chain`), r_* under the policy that maximises
E r - alpha KL. What pairs of best and worst converge to is not that optimum: the share says which way they go.
"""

from collections.abc import Iterator

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.diffusion.chain import objective
from ddpo.control.diffusion.toy_problem import ToyProblem, toy_problem
from ddpo.objectives.preference import PreferenceConfig
from ddpo.sampling.samplers import SamplerConfig
from trainers.verification.optimum import Recipe, train_quietly

SHARE = 0.3
RECIPES = {
    preset: Recipe(objective=config, samples_per_epoch=512, epochs=15, learning_rate=0.04)
    for preset, config in (
        ("dpo", PreferenceConfig(preset="dpo", beta=8.0, noises=4)),
        ("kto", PreferenceConfig(preset="kto", beta=8.0, noises=4)),
        ("d3po", PreferenceConfig(preset="d3po", beta=1.0, clip=None)),
        ("spo", PreferenceConfig(preset="spo", beta=1.0, clip=None, margin=0.0, first_step=0)),
    )
}


def reward_share(problem: ToyProblem, recipe: Recipe) -> float:
    """Trains an affine policy; the share of the optimum's gain in reward that it makes."""
    weights = train_quietly(problem.policy(), problem, recipe)
    trained = problem.chain(weights["head.gain"], weights["head.shift"])
    start, now, best = (
        float(objective(chain, problem.reference, problem.reward, 0.0))
        for chain in (problem.reference, trained, problem.optimum.chain)
    )
    return (now - start) / (best - start)


def check_online() -> Iterator[Measurement]:
    """Each preset's rise of the reward in 15 epochs of 512 paths."""
    problem = toy_problem(2, sampler=SamplerConfig(num_steps=5, guidance_scale=1.0), seed=3)
    for preset, recipe in RECIPES.items():
        share = reward_share(problem, recipe)
        yield Measurement(name=f"{preset}, {recipe.num_paths:,} paths: share of the optimum's gain", exact=f"> {SHARE}",
                          obtained=share, error=1 - share, tolerance=1 - SHARE)  # fmt: skip


CHECKS = (
    Check(name="online", group="preference", level="full", run=check_online,
          claim="Online DPO, KTO, D3PO and SPO raise the expected reward of a chain, which is known exactly."),
)  # fmt: skip
