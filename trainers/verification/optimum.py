"""The trainer against the exact optimum: the loop that fine-tunes Stable Diffusion, on a problem with a known answer.

    gap = (J* - J) / (J* - J_ref)

with J of the exported weights computed exactly (`ddpo.control.diffusion.chain`, `ddpo.control.diffusion.grid_chain`),
J* the optimum and J_ref the pretrained policy. 0 is the optimum, 1 is where training started.

Weighted regression has no KL term; what one converged round of it must find is the denoiser of the tilted law, and its
gap is the squared distance of the predicted clean states to that denoiser's, over the pretrained one's.
"""

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ddpo import FullConfig, Policy
from ddpo.control.checks.base import Check, Measurement
from ddpo.control.diffusion.chain import relative_gap, tilted_terminal
from ddpo.control.diffusion.toy_pipeline import toy_schedule
from ddpo.control.diffusion.toy_problem import MixtureProblem, ToyProblem, mixture_problem, toy_problem
from ddpo.credit.advantages import AdvantageConfig
from ddpo.credit.kl import FixedKL
from ddpo.objectives import PolicyGradientConfig
from ddpo.objectives.adjoint_matching import AdjointMatchingConfig
from ddpo.objectives.clean_sample import CleanSampleConfig
from ddpo.objectives.preference import PreferenceConfig
from ddpo.objectives.reward_gradient import RewardGradientConfig
from ddpo.sampling.samplers import SamplerConfig
from rewards.reward import Reward
from trainers.config import Config
from trainers.config.groups import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
)
from trainers.loop import train

GAP_BAR = 2e-3
REGRESSION_BAR = 2e-2


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
        optimizer: In place of AdamW with that rate; its own keys decide then.
    """

    objective: (
        PolicyGradientConfig | CleanSampleConfig | PreferenceConfig | RewardGradientConfig | AdjointMatchingConfig
    )
    advantages: AdvantageConfig = field(
        default_factory=lambda: AdvantageConfig(baseline="batch", scale="batch_std", clip=None)
    )
    samples_per_epoch: int = 2048
    epochs: int = 200
    learning_rate: float = 0.02
    ema_decay: float = 0.9
    seed: int = 0
    optimizer: OptimizerConfig | None = None

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
REGRESSION = Recipe(
    objective=CleanSampleConfig(temperature=0.5, noises=16, updates_per_epoch=16, inner_epochs=8),
    samples_per_epoch=2048,
    epochs=1,
    learning_rate=0.1,
    ema_decay=0.95,
)
MIXTURE = Recipe(objective=PPO.objective, epochs=300, learning_rate=0.01, ema_decay=0.95)


def train_quietly(policy: Policy, problem: ToyProblem | MixtureProblem, recipe: Recipe) -> dict[str, Tensor]:
    """Runs `trainers.loop.train` in a temporary folder and returns the weights that it exports, by name."""
    with quiet_run(policy, problem, recipe) as run:
        (weights,) = (run / "lora").glob("**/*.safetensors")
        return load_file(weights)


@contextmanager
def quiet_run(
    policy: Policy, problem: ToyProblem | MixtureProblem, recipe: Recipe, *, every_epochs: int = 0
) -> Iterator[Path]:
    """The run folder of such a run, for the time of a `with` block, with a checkpoint every so many epochs."""
    stochastic, demand = len(policy.schedule.stochastic_steps), recipe.objective.build().demand
    reward = Reward(name="score", function=problem.score, differentiable=True)
    config = Config(
        adapter=FullConfig(),
        objective=recipe.objective,
        kl=FixedKL(alpha=problem.alpha if demand.likelihood or demand.weighs_kl else 0.0),
        advantages=recipe.advantages,
        batch=BatchConfig(
            samples_per_epoch=recipe.samples_per_epoch,
            sample_batch_size=recipe.samples_per_epoch,
            train_batch_size=recipe.samples_per_epoch * max(1, stochastic),
        ),
        optimizer=recipe.optimizer or _adamw(recipe),
        evaluation=EvaluationConfig(every_epochs=0, num_prompts=1, images_per_prompt=2, ode=False),
        checkpoints=CheckpointConfig(every_epochs=every_epochs, keep_last=recipe.epochs + 1),
        tracking=TrackingConfig(trackers=(), pictures_every_epochs=0),
        epochs=recipe.epochs,
        seed=recipe.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            config = replace(config, run=RunConfig(output_dir=folder, name="run"))
            run = train(policy, reward=reward, prompts=["data"], config=config)
        yield run


def _adamw(recipe: Recipe) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=recipe.learning_rate,
        beta2=0.99,
        weight_decay=0.0,
        max_grad_norm=1e9,
        schedule="linear",
        ema_decay=recipe.ema_decay,
    )


def affine_gap(problem: ToyProblem, recipe: Recipe) -> float:
    """Trains an affine policy and returns its gap."""
    weights = train_quietly(problem.policy(), problem, recipe)
    still = {name: torch.zeros_like(value) for name, value in weights.items()}
    value, start = (float(problem.value(head["head.gain"], head["head.shift"])) for head in (weights, still))
    return relative_gap(value, problem.optimum.objective, start)


def tilted_denoiser_gap(problem: ToyProblem, recipe: Recipe, *, temperature: float) -> float:
    """Trains an affine policy by weighted regression; how far its predictions are from the tilted law's denoiser.

    The pretrained chain ends in N(m_0, C_0), which exp(r / temperature) tilts to N(m, C). The denoiser of that is
    E[z | x] = m + a C (a^2 C + s^2 I)^-1 (x - a m), and squared distances are means over x ~ N(a m, a^2 C + s^2 I).
    """
    head = train_quietly(problem.policy(), problem, recipe)
    schedule, law = toy_schedule(problem.sampler)[1], tilted_terminal(problem.reference, problem.reward, temperature)

    def distance(share: float) -> float:
        total = 0.0
        for k in schedule.stochastic_steps:
            a, s, std = (float(values[k]) for values in (schedule.a, schedule.s, schedule.std))
            scale = share * std / float(schedule.a_next[k] - schedule.direction[k] * a / s)  # the head's, on x0
            own, target = _denoiser(problem.mean, problem.cov, a, s), _denoiser(*law, a, s)
            gain = own[0] + scale * head["head.gain"][k].double() - target[0]
            shift = own[1] + scale * head["head.shift"][k].double() - target[1]
            spread = a**2 * law[1] + s**2 * torch.eye(len(shift), dtype=torch.float64)
            total += float((gain @ law[0] * a + shift).square().sum() + (gain @ spread @ gain.T).trace())
        return total

    return distance(1.0) / distance(0.0)


def _denoiser(mean: Tensor, cov: Tensor, a: float, s: float) -> tuple[Tensor, Tensor]:
    """E[z | x] = gain x + shift of z ~ N(mean, cov), x = a z + s eps."""
    spread = a**2 * cov + s**2 * torch.eye(len(mean), dtype=torch.float64)
    gain = a * torch.linalg.solve(spread, cov)  # symmetric factors commute
    return gain, mean - a * gain @ mean


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


def check_ddim(name: str, recipe: Recipe) -> Iterator[Measurement]:
    """A policy gradient on DDIM, d = 4."""
    yield measured(f"{name}, {recipe.num_paths:,} paths", affine_gap(toy_problem(), recipe))


def check_flow() -> Iterator[Measurement]:
    """REINFORCE on the flow SDE."""
    problem = toy_problem(sampler=SamplerConfig(kind="flow_sde", num_steps=10, eta=0.7, guidance_scale=1.0))
    yield measured(f"REINFORCE, {REINFORCE.num_paths:,} paths", affine_gap(problem, REINFORCE))


def check_mixture() -> Iterator[Measurement]:
    """PPO with a network on bimodal data."""
    yield measured(f"PPO, {MIXTURE.num_paths:,} paths", mixture_gap(mixture_problem(), MIXTURE))


def check_regression() -> Iterator[Measurement]:
    """Weighted regression; what is left is the noise of 2,048 samples, whose weights count as about 1,000."""
    assert isinstance(REGRESSION.objective, CleanSampleConfig)
    temperature = REGRESSION.objective.knobs.temperature
    gap = tilted_denoiser_gap(toy_problem(2), REGRESSION, temperature=temperature)
    yield measured(f"rwr, {REGRESSION.num_paths:,} samples", gap, REGRESSION_BAR)


CHECKS = (
    Check(name="optimum, DDIM", group="trainer", level="fast",
          run=partial(check_ddim, "REINFORCE", REINFORCE),
          claim="The trainer reaches the closed-form optimum of E[r] - alpha sum KL (Gaussian data, d = 4)."),
    Check(name="optimum, DDIM, PPO", group="trainer", level="full", run=partial(check_ddim, "PPO", PPO),
          claim="So it does with clipped ratios and several updates an epoch."),
    Check(name="optimum, flow SDE", group="trainer", level="full", run=check_flow,
          claim="The same for the flow-matching SDE."),
    Check(name="optimum, mixture", group="trainer", level="slow", run=check_mixture,
          claim="A network on bimodal data reaches the optimum that dynamic programming knows."),
    Check(name="tilted law, regression", group="trainer", level="full", run=check_regression,
          claim="One converged round of weighted regression is the denoiser of the reward-tilted law (Gaussian data)."),
)  # fmt: skip
