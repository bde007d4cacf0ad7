"""Adjoint matching with the whole trainer: resumes, processes, precisions, families, plans, refusals."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpo import FullConfig, LoraConfig, Policy, SamplerConfig
from ddpo.credit.kl import FixedKL
from ddpo.objectives.adjoint_matching import AdjointMatchingConfig
from tests.ddpo.test_families import PROMPTS, make
from tests.tiny import tiny_stable_diffusion
from tests.trainers.epoch.test_reward_gradient import bright, small, summed, tiny_policy
from tests.trainers.loop_helpers import assert_trained_alike, reproducible, start, weights, write_config
from tests.trainers.world import all_succeed, command
from trainers.config import Config
from trainers.config.io import load_config
from trainers.loop import resume, train
from trainers.planning.plan import make_plan
from trainers.planning.preflight import preflight
from trainers.run_folder.folder import read_metrics

BASE = """\
model: {{path: {model}}}
adapter: {{rank: 2}}
sampler: {{num_steps: 3, guidance_scale: 2.0}}
objective: {{kind: adjoint_matching, steps_per_sample: 2, loss_quantile: 0.8, replay_epochs: 1, updates_per_epoch: 2}}
kl: {{alpha: 0.1}}
batch: {{samples_per_epoch: 5, group_size: 1, sample_batch_size: 3, train_batch_size: 2, trajectories: cpu}}
optimizer: {{learning_rate: 1e-3, ema_decay: 0.9}}
rewards: [{{name: brightness, normalize: std, weight: 2}}]
prompts: {{source: {prompts}}}
evaluation: {{num_prompts: 1, images_per_prompt: 2, every_epochs: 0, ode: false}}
checkpoints: {{every_epochs: 1, keep_last: 10}}
tracking: {{trackers: [], pictures_every_epochs: 0}}
run: {{output_dir: {output}}}
epochs: 3
"""


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path, model, template=BASE)


def test_a_resume_finds_the_buffer_and_the_threshold_again(config: Path) -> None:
    whole = start(config, "--run.name", "whole")
    parts = start(config, "--run.name", "parts", "--epochs", "1")
    resume(parts, ["--epochs", "3"])
    groups = ("weights", "optimizer", "ema", "prepared_0")
    first, second = weights(whole, *groups), weights(parts, *groups)
    assert "prepared_0.threshold" in first and first["prepared_0.0.states"].shape[:2] == (5, 2)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert str(reproducible(whole)) == str(reproducible(parts))
    row = read_metrics(whole)[-1]
    assert row["policy/matching_nats"] > 0 and row["policy/target_kl_nats"] > 0 and row["policy/clip_fraction"] > 0
    assert max(float(value.abs().max()) for name, value in first.items() if "lora_B" in name) > 1e-4


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one(config: Path, tmp_path: Path, strategy: str) -> None:
    runs = {}
    for count in (1, 2):
        name = f"{strategy}{count}"
        arguments = ["train", str(config), "--run.name", name, "--epochs", "2", "--distributed.strategy", strategy]
        all_succeed(command, arguments, count=count, log=tmp_path / f"{name}.log")
        runs[count] = tmp_path / "runs" / name
    one, two = weights(runs[1], "weights"), weights(runs[2], "weights")
    assert_trained_alike(one, two)
    for row, other in zip(reproducible(runs[1]), reproducible(runs[2]), strict=True):
        for key in ("reward/mean", "policy/matching_nats", "policy/clip_fraction", "optimizer/grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=1e-3), key


def adjoint(folder: Path, **changes: object) -> Config:
    return small(folder, **{"objective": AdjointMatchingConfig(), "kl": FixedKL(alpha=0.1), **changes})


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_every_familys_chain_has_adjoints(family: str, tmp_path: Path) -> None:
    (row,) = read_metrics(train(make(family), reward="brightness", prompts=list(PROMPTS), config=adjoint(tmp_path)))
    assert row["policy/target_kl_nats"] > 0 and row["optimizer/grad_norm"] > 0
    # At the pretrained weights the control is 0, so that the loss is the targets' own size.
    assert row["policy/matching_nats"] == pytest.approx(row["policy/target_kl_nats"], rel=1e-3)


@pytest.mark.parametrize("adapter", [LoraConfig(rank=2), FullConfig()], ids=["lora", "full"])
def test_it_trains_in_bfloat16(adapter: LoraConfig | FullConfig, tmp_path: Path) -> None:
    sampler = SamplerConfig(num_steps=3, guidance_scale=2.0)
    policy = Policy(tiny_stable_diffusion(), sampler=sampler, adapter=adapter, precision="bf16")
    config = adjoint(tmp_path, adapter=adapter, epochs=2)
    rows = read_metrics(train(policy, reward="brightness", prompts=list(PROMPTS), config=config))
    assert all(row["optimizer/grad_norm"] > 0 and row["policy/matching_nats"] < 1e6 for row in rows)


def test_samples_whose_reward_has_no_finite_gradient_are_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def root(images: Tensor, prompts: list[str], metadata: object) -> Tensor:
        """0 everywhere; for the second prompt as the root of 0, which has no slope."""
        zeros = 0 * images.mean((1, 2, 3))
        return torch.stack(
            [zero.sqrt() if prompt == PROMPTS[1] else zero for zero, prompt in zip(zeros, prompts, strict=True)]
        )

    mixed = summed(("bright", bright, True), ("root", root, True))
    (row,) = read_metrics(train(tiny_policy(), reward=mixed, prompts=list(PROMPTS), config=adjoint(tmp_path)))
    said = capsys.readouterr().err
    assert f"the gradient of reward 'root' is not finite for the prompt {PROMPTS[1]!r}: left out" in said
    assert row["optimizer/skipped"] == 0 and row["optimizer/grad_norm"] > 0 and 0 < row["policy/clip_fraction"] < 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--kl.alpha", "0"), "kl.alpha: must be positive with objective.kind: adjoint_matching"),
        (("--sampler.kind", "ode"), "sampler.kind: must be a stochastic sampler with objective.kind: adjoint_m"),
        (("--sampler.eta", "0"), "sampler.kind: must be a stochastic sampler with objective.kind: adjoint_m"),
        (("--sampler.eta", "1.4"), r"sampler.eta: must be in \[0, 1\]"),
        (("--rewards", "[{name: jpeg_compressibility}]"), "rewards: jpeg_compressibility must be differentiable"),
        (("--rewards", "[{name: brightness}, {name: diversity}]"), "rewards: diversity must compare no images"),
        (("--reward_processes.devices", "[cpu]"), r"reward_processes.devices: must be \[\] with the objective adjoint"),
        (("--shaping.steps", "[1]"), r"shaping.steps: must be \[\] with objective.kind: adjoint_matching"),
        (("--objective.updates_per_epoch", "9"), "objective.updates_per_epoch must be at most 4"),
        (("--objective.pairing", "previous"), "objective.pairing: must be"),
    ],
)
def test_what_it_cannot_use_is_refused_before_weights_load(
    config: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        preflight(load_config(config, overrides), num_processes=1)


def test_rows_are_the_adjoints_of_all_steps_and_the_terms_of_some(config: Path) -> None:
    plan = make_plan(load_config(config), num_processes=1, num_stochastic=3)
    few = 1 * 2  # the KL that is only logged, at one site
    assert plan.sampling_rows == 5 * 3 * 2 and plan.reference_rows == 5 * 3 * 2 + few
    assert plan.training_rows == 5 * 4 * 2 and plan.units_per_update == (10, 10)
