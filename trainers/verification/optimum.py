"""The trainer against the exact optimum: the loop that fine-tunes Stable Diffusion, on a problem with a known answer.

    gap = (J* - J) / (J* - J_ref)

with J of the exported weights computed exactly (`ddpo.control.chain`, `ddpo.control.grid_chain`), J* the optimum and
J_ref the pretrained policy. 0 is the optimum, 1 is where training started.
"""

import io
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace

import torch
from safetensors.torch import load_file
from torch import Tensor

from ddpo import FullConfig, Policy
from ddpo.advantages import AdvantageConfig
from ddpo.control.chain import relative_gap
from ddpo.control.checks.base import Check, Measurement
from ddpo.control.toy_problem import MixtureProblem, ToyProblem, mixture_problem, toy_problem
from ddpo.kl import FixedKL
from ddpo.objectives import PolicyGradientConfig
from ddpo.samplers import SamplerConfig
from trainers.config import Config
from trainers.config_groups import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
)
from trainers.loop import train

GAP_BAR = 2e-3


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a training run is told.

    Attributes:
        objective: The algorithm.
        advantages: How scores become advantages.
        samples_per_epoch: Paths an epoch.
        epochs: Number of epochs.
        learning_rate: Adam's peak step, falling linearly to 0.
        ema_decay: Of the averaged weights, which are exported.
        seed: Of the paths.
    """

    objective: PolicyGradientConfig
    advantages: AdvantageConfig = field(
        default_factory=lambda: AdvantageConfig(baseline="batch", scale="batch_std", clip=None)
    )
    samples_per_epoch: int = 2048
    epochs: int = 200
    learning_rate: float = 0.02
    ema_decay: float = 0.9
    seed: int = 0

    @property
    def num_paths(self) -> int:
        """Paths of the whole run."""
        return self.samples_per_epoch * self.epochs


REINFORCE = Recipe(objective=PolicyGradientConfig(surrogate="reinforce", updates_per_epoch=1))
PPO = Recipe(
    objective=PolicyGradientConfig(surrogate="ppo", ratio="joint", updates_per_epoch=3),
    samples_per_epoch=4096,
    epochs=100,
)
MIXTURE = Recipe(objective=PPO.objective, epochs=300, learning_rate=0.01, ema_decay=0.95)


def train_quietly(policy: Policy, problem: ToyProblem | MixtureProblem, recipe: Recipe) -> dict[str, Tensor]:
    """Runs `trainers.loop.train` in a temporary folder and returns the weights that it exports, by name."""
    stochastic = len(policy.schedule.stochastic_steps)
    config = Config(
        adapter=FullConfig(),
        objective=recipe.objective,
        kl=FixedKL(alpha=problem.alpha),
        advantages=recipe.advantages,
        batch=BatchConfig(
            samples_per_epoch=recipe.samples_per_epoch,
            sample_batch_size=recipe.samples_per_epoch,
            train_batch_size=recipe.samples_per_epoch * stochastic,
        ),
        optimizer=OptimizerConfig(
            learning_rate=recipe.learning_rate,
            beta2=0.99,
            weight_decay=0.0,
            max_grad_norm=1e9,
            schedule="linear",
            ema_decay=recipe.ema_decay,
        ),
        evaluation=EvaluationConfig(every_epochs=0, num_prompts=1, images_per_prompt=2, ode=False),
        checkpoints=CheckpointConfig(every_epochs=0),
        tracking=TrackingConfig(trackers=(), pictures_every_epochs=0),
        epochs=recipe.epochs,
        seed=recipe.seed,
    )
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        config = replace(config, run=RunConfig(output_dir=folder, name="run"))
        run = train(policy, reward=problem.score, prompts=[""], config=config)
        (weights,) = (run / "lora").glob("**/*.safetensors")
        return load_file(weights)


def affine_gap(problem: ToyProblem, recipe: Recipe) -> float:
    """Trains an affine policy and returns its gap."""
    weights = train_quietly(problem.policy(), problem, recipe)
    still = {name: torch.zeros_like(value) for name, value in weights.items()}
    value, start = (float(problem.value(head["head.gain"], head["head.shift"])) for head in (weights, still))
    return relative_gap(value, problem.optimum.objective, start)


def mixture_gap(problem: MixtureProblem, recipe: Recipe) -> float:
    """Trains a small network on mixture data and returns its gap."""
    policy = problem.policy()
    start = problem.value(policy)
    weights = train_quietly(policy, problem, recipe)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            parameter.copy_(weights[name])
    return relative_gap(problem.value(policy), problem.chain.optimum()[0], start)


def measured(name: str, gap: float, bar: float = GAP_BAR) -> Measurement:
    """A gap as a row."""
    return Measurement(name=name, exact="gap 0", obtained=f"gap {gap:.1e}", error=gap, tolerance=bar)


def check_ddim() -> Iterator[Measurement]:
    """REINFORCE and PPO on DDIM, d = 4."""
    for name, recipe in (("REINFORCE", REINFORCE), ("PPO", PPO)):
        yield measured(f"{name}, {recipe.num_paths:,} paths", affine_gap(toy_problem(), recipe))


def check_flow() -> Iterator[Measurement]:
    """REINFORCE on the flow SDE."""
    problem = toy_problem(sampler=SamplerConfig(kind="flow_sde", num_steps=10, eta=0.7, guidance_scale=1.0))
    yield measured(f"REINFORCE, {REINFORCE.num_paths:,} paths", affine_gap(problem, REINFORCE))


def check_mixture() -> Iterator[Measurement]:
    """PPO with a network on bimodal data."""
    yield measured(f"PPO, {MIXTURE.num_paths:,} paths", mixture_gap(mixture_problem(), MIXTURE))


CHECKS = (
    Check(name="optimum, DDIM", group="trainer", level="fast", run=check_ddim,
          claim="The trainer reaches the closed-form optimum of E[r] - alpha sum KL (Gaussian data, d = 4)."),
    Check(name="optimum, flow SDE", group="trainer", level="full", run=check_flow,
          claim="The same for the flow-matching SDE."),
    Check(name="optimum, mixture", group="trainer", level="full", run=check_mixture,
          claim="A network on bimodal data reaches the optimum that dynamic programming knows."),
)  # fmt: skip
