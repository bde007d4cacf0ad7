"""The critic that the trainer learns, held against the exact value function of the policy that it watches.

The policy stays where it is, at random weights of the affine chain: its learning rate is next to nothing.
"""

import io
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from ddpo import FullConfig
from ddpo.control.checks.base import Check, Measurement
from ddpo.control.checks.critic import CRITIC, LAMBDAS, drawn, exact_values, spread_of, spread_row, values_of
from ddpo.control.diffusion.gradient_check import Paths, Values
from ddpo.credit.advantages import AdvantageConfig
from ddpo.credit.critic import Critic, CriticConfig, pooled_prompt
from ddpo.credit.gae import returns
from ddpo.credit.kl import FixedKL
from ddpo.objectives import PolicyGradientConfig
from ddpo.trajectory import Trajectory
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

EPOCHS, SAMPLES = 40, 512
ERROR_BAR = 0.02
STILL = 1e-12  # learning rate of the policy


@cache
def watched() -> tuple[Paths, Critic]:
    """Paths of a policy, and the critic that the trainer has learnt of other paths of it."""
    paths = drawn()
    config = Config(
        adapter=FullConfig(),
        objective=PolicyGradientConfig(surrogate="reinforce", updates_per_epoch=1),
        kl=FixedKL(alpha=paths.problem.alpha),
        advantages=AdvantageConfig(baseline="critic"),
        critic=CriticConfig(kind="network", updates_per_epoch=40, learning_rate=2e-3, batch_size=SAMPLES),
        batch=BatchConfig(
            samples_per_epoch=SAMPLES, group_size=1, sample_batch_size=SAMPLES, train_batch_size=10 * SAMPLES
        ),
        optimizer=OptimizerConfig(learning_rate=STILL, weight_decay=0.0),
        evaluation=EvaluationConfig(every_epochs=0, num_prompts=1, images_per_prompt=2, ode=False),
        checkpoints=CheckpointConfig(every_epochs=0),
        tracking=TrackingConfig(trackers=(), pictures_every_epochs=0),
        epochs=EPOCHS,
        seed=1,
    )
    reward = Reward(name="score", function=paths.problem.score)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        config = replace(config, run=RunConfig(output_dir=folder, name="run"))
        run = train(paths.policy, reward=reward, prompts=["data"], config=config)
        return paths, Critic.read(run / "lora")


def learnt_values(critic: Critic, alpha: float) -> Values:
    """What a critic of a score and the KL expects of chains."""

    @torch.no_grad()
    def values(path: Trajectory) -> Tensor:
        count, num_steps = len(path.seeds), path.schedule.num_steps
        steps = torch.arange(num_steps).repeat(count)
        prompts = pooled_prompt(path.condition, count).repeat_interleave(num_steps, dim=0)
        score, kl = critic(steps, path.latents[:, :-1].flatten(0, 1), prompts).unflatten(0, (count, -1)).unbind(-1)
        return score - alpha * kl

    return values


def check_value_error() -> Iterator[Measurement]:
    """At states that it was not fitted to, step by step."""
    paths, critic = watched()
    learnt, exact = learnt_values(critic, paths.problem.alpha), values_of(exact_values(paths))
    pairs = [(learnt(path).double(), exact(path), earned(paths, path, scores))
             for path, scores in zip(paths.chunks, paths.scores, strict=True)]  # fmt: skip
    found, truth, came = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    error = ((found - truth).square().mean(0) / came.var(0)).tolist()
    yield Measurement(name="E (V - exact)^2 / Var return: steps 0, 3, 6, 9, mean", exact=0.0,
                      obtained=", ".join(f"{error[k]:.2g}" for k in (0, 3, 6, 9)) + f", {sum(error) / len(error):.2g}",
                      error=sum(error) / len(error), tolerance=ERROR_BAR)  # fmt: skip


def earned(paths: Paths, path: Trajectory, scores: Tensor) -> Tensor:
    """What chains earned from each state on, (B, T) float64."""
    assert path.kl is not None, "drawn with it"
    return returns(scores.double(), -paths.problem.alpha * path.kl.double())


def check_variance() -> Iterator[Measurement]:
    """The rest of the table of baselines."""
    paths, critic = watched()
    batch = spread_of(paths, AdvantageConfig(baseline="batch", scale="none"))
    learnt = learnt_values(critic, paths.problem.alpha)
    for gae_lambda in LAMBDAS:
        found = spread_of(paths, replace(CRITIC, gae_lambda=gae_lambda), learnt)
        yield spread_row(f"learnt critic, lambda {gae_lambda:g}", found, bar=batch)


CHECKS = (
    Check(name="value error", group="critic", level="full", run=check_value_error,
          claim="The trainer's critic learns the exact value function of the policy that it watches."),
    Check(name="variance, learnt", group="critic", level="full", run=check_variance,
          claim="Its advantages and gradients, too, vary less than those against other samples."),
)  # fmt: skip
