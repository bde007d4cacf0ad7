"""Tiny runs of the real trainer, healthy or sick in one way, on Gaussian data whose denoiser is exact.

Those with guidance, which Gaussian data do not have, are of a tiny random Stable Diffusion.

`python -m tests.trainers.diagnosis.patients` prints what the doctor finds in each.
"""

import io
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ddpo import FullConfig, Policy, SamplerConfig
from ddpo.control.diffusion.toy_problem import toy_problem
from ddpo.credit.advantages import AdvantageConfig
from ddpo.credit.kl import FixedKL
from ddpo.objectives import PolicyGradientConfig
from rewards import WeightedSum
from rewards.reward import Reward
from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import start, write_config
from trainers.config import Config
from trainers.config.groups import BatchConfig, EvaluationConfig, OptimizerConfig, RunConfig, TrackingConfig
from trainers.diagnosis.doctor import examine
from trainers.loop import train

EPOCHS = 24


@dataclass(frozen=True, kw_only=True)
class Patient:
    """What a run is told, and what is wrong with it; `guided` is `train_guidance` at guidance 3, None without."""

    expect: str | None = None
    rate: float = 0.02
    alpha: float = 0.1
    group: int = 8
    samples: int = 128
    clip: float | None = 0.2
    ratio: str = "joint"
    updates: int = 2
    steps: int = 5
    baseline: str = "group"
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = field(default=lambda score, images: score)
    noise: float = 0.0
    overflow_every: int = 0
    guided: str | None = None
    heldout: bool = False
    epochs: int = EPOCHS
    seed: int = 0


def _noise(score, images):
    return torch.randn(len(score))


def _nearly_always(score, images):
    """1 but for a seldom image, whatever is learned."""
    return 1.0 - (torch.rand(len(score)) < 0.02).float()


def _slow(score, images):
    time.sleep(1.5)
    return score


HEALTHY = {
    "seed 0": Patient(),
    "seed 1": Patient(seed=1),
    "seed 2": Patient(seed=2),
    "free KL": Patient(alpha=0.0, seed=3),
    "half the rate": Patient(rate=0.01, seed=4),
    "groups of 4": Patient(group=4, seed=5),
    "whole-batch baseline": Patient(baseline="batch", seed=6),
    "one update": Patient(updates=1, seed=7),
    "ten steps": Patient(steps=10, seed=8),
    "three updates": Patient(updates=3, seed=9),
    "guided": Patient(guided="same", rate=1e-4, epochs=6),
}
SICK = {
    "rate x 50": Patient(rate=1.0, expect="rate too large|collapse|divergence"),
    "rate / 100": Patient(rate=2e-4, expect="rate too small"),
    "constant reward": Patient(score=lambda score, images: torch.ones_like(score), expect="no signal"),
    "reward is noise": Patient(score=_noise, alpha=0.0, expect="reward noise"),
    "saturated groups": Patient(score=_nearly_always, alpha=0.0, expect="saturated groups"),
    "dropout left on": Patient(noise=0.1, expect="drift"),
    "clip 1e-9": Patient(clip=1e-9, expect="clip eats all"),
    "groups of 2": Patient(group=2, expect="tiny groups"),
    "KL weight x 1000": Patient(alpha=100.0, expect="KL weight too heavy"),
    "gradients overflow": Patient(overflow_every=8, expect="divergence"),
    "guidance in sampling only": Patient(guided="none", rate=1e-4, epochs=6, expect="guidance differs"),
    "slow reward": Patient(score=_slow, epochs=6, expect="reward bound"),
    "reward hacking": Patient(heldout=True, alpha=0.0, rate=0.05, expect="over-optimisation"),
}


PROMPTS = [f"prompt {i}" for i in range(16)]


def run(patient: Patient, folder: Path, *, printed: io.StringIO | None = None) -> Path:
    """Trains; returns the run folder. What it prints on stderr goes to `printed`."""
    if patient.guided is not None:
        return _guided(patient, folder)
    policy, reward, heldout, config = made(patient, folder)
    with redirect_stdout(io.StringIO()), redirect_stderr(printed or io.StringIO()):
        return train(policy, reward=reward, heldout=heldout, prompts=PROMPTS, config=config)


def _guided(patient: Patient, folder: Path) -> Path:
    tiny_stable_diffusion().save_pretrained(folder / "model", safe_serialization=True)
    config = write_config(folder, folder / "model", guidance=3.0)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return start(
            config, f"--epochs={patient.epochs}", f"--objective.train_guidance={patient.guided}", "--run.name=run",
            "--batch.samples_per_epoch=16", "--batch.group_size=8", "--evaluation.ode=false",
            f"--optimizer.learning_rate={patient.rate}",
        )  # fmt: skip


class _Overflow:
    """A forward hook that makes the gradient of every n-th pass infinite."""

    def __init__(self, every: int) -> None:
        self.every, self.passes = every, 0

    def __call__(self, module, inputs, output):
        if output[0].requires_grad:
            self.passes += 1
            if self.passes % self.every == 0:
                output[0].register_hook(lambda gradient: gradient * float("inf"))


def made(patient: Patient, folder: Path) -> tuple[Policy, WeightedSum, WeightedSum | None, Config]:
    """Policy, reward, held-out reward and configuration."""
    torch.manual_seed(patient.seed)
    problem = toy_problem(sampler=SamplerConfig(num_steps=patient.steps, guidance_scale=1.0))
    policy = problem.policy()
    if patient.noise:
        policy.denoiser.network.module.register_forward_hook(
            lambda module, inputs, output: (torch.nn.functional.dropout(output[0], patient.noise), *output[1:])
        )
    if patient.overflow_every:
        policy.denoiser.network.module.register_forward_hook(_Overflow(patient.overflow_every))
    reward = Reward(name="score", function=lambda x, p, m: patient.score(problem.score(x, p, m), x))
    far = Reward(name="near", function=lambda x, p, m: -(x - 0.5).abs().flatten(1).mean(1))
    config = Config(
        adapter=FullConfig(),
        objective=PolicyGradientConfig(
            surrogate="ppo" if patient.updates > 1 else "reinforce",
            ratio=patient.ratio,
            clip_range=patient.clip,
            updates_per_epoch=patient.updates,
        ),
        kl=FixedKL(alpha=patient.alpha),
        advantages=AdvantageConfig(baseline=patient.baseline),
        batch=BatchConfig(
            samples_per_epoch=patient.samples, group_size=patient.group, sample_batch_size=patient.samples,
            train_batch_size=patient.samples * patient.steps,
        ),
        optimizer=OptimizerConfig(learning_rate=patient.rate, weight_decay=0.0),
        evaluation=EvaluationConfig(every_epochs=8 if patient.heldout else 0, num_prompts=16, images_per_prompt=2,
                                    ode=False),
        tracking=TrackingConfig(trackers=(), pictures_every_epochs=0, num_pictures=1),
        run=RunConfig(name="run", output_dir=str(folder)),
        epochs=patient.epochs,
        gate_tolerance=1e6 if patient.noise else None,
        seed=patient.seed,
    )  # fmt: skip
    return policy, WeightedSum.of(reward), WeightedSum.of(far) if patient.heldout else None, config


def diagnose(patient: Patient) -> dict[str, str]:
    """Names of the findings and their evidence, without `fine`."""
    with tempfile.TemporaryDirectory() as folder:
        found = examine(run(patient, Path(folder)))
    return {finding.name: finding.evidence for finding in found if finding.verdict != "fine"}


def table(names: list[str]) -> None:
    """Prints the findings of patients (default: of all), a row each of the table in docs/diagnosis.md."""
    for name, patient in (HEALTHY | SICK).items():
        if names and name not in names:
            continue
        found = ", ".join(diagnose(patient)) or "nothing"
        expected = (patient.expect or "nothing").replace("|", " or ")
        print(f"| {name} | {expected} | {found} |", flush=True)


if __name__ == "__main__":
    table(sys.argv[1:])
