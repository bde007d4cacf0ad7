"""The methods on clean samples through the whole trainer: their old policy, resumes, processes, families, refusals."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddpo import FullConfig, LoraConfig, Policy, SamplerConfig
from ddpo.objectives.clean_sample import CleanSampleConfig
from tests.ddpo.test_families import FAMILIES, PROMPTS, make
from tests.trainers.loop_helpers import assert_trained_alike, reproducible, start, weights, write_config
from tests.trainers.world import all_succeed, command
from trainers.config import Config
from trainers.config.groups import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
)
from trainers.config.io import ConfigError, load_config
from trainers.loop import resume, train
from trainers.planning.plan import make_plan
from trainers.run_folder.folder import read_metrics

BASE = """\
model: {{path: {model}}}
adapter: {{rank: 2}}
sampler: {{kind: ode, num_steps: 3, guidance_scale: 2.0}}
objective: {{kind: clean_sample, preset: nft, old_rate: 0.3, noises: 3, updates_per_epoch: 2}}
batch: {{samples_per_epoch: 8, group_size: 2, sample_batch_size: 3, train_batch_size: 5}}
optimizer: {{learning_rate: 1e-3}}
rewards: [{{name: brightness}}]
prompts: {{source: {prompts}}}
evaluation: {{num_prompts: 2, images_per_prompt: 2, every_epochs: 0}}
checkpoints: {{every_epochs: 1, keep_last: 10}}
tracking: {{trackers: [], pictures_every_epochs: 0}}
run: {{output_dir: {output}}}
epochs: 2
"""


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path, model, template=BASE)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_resume_is_bit_exact_and_the_old_policy_lags_behind(config: Path, adapter: str) -> None:
    if adapter == "full":
        config.write_text(config.read_text().replace("adapter: {rank: 2}", "adapter: {kind: full}"))
    whole = start(config, "--run.name", "whole")
    parts = start(config, "--run.name", "parts", "--epochs", "1")
    resume(parts, ["--epochs", "2"])
    groups = ("weights", "optimizer", "old")
    first, second = weights(whole, *groups), weights(parts, *groups)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert reproducible(whole) == reproducible(parts)
    names = [name.removeprefix("old.") for name in first if name.startswith("old.")]
    behind = max(float((first[f"old.{name}"] - first[f"weights.{name}"]).abs().max()) for name in names)
    assert behind > 1e-5
    row = read_metrics(whole)[-1]
    assert row["policy/distance_to_old"] > 0 and row["policy/distance_to_reference"] > 0
    assert 0 <= row["policy/advantage_clipped"] < 1


def test_two_processes_train_as_one(config: Path, tmp_path: Path) -> None:
    runs = {}
    for count in (1, 2):
        arguments = ["train", str(config), "--run.name", f"p{count}", "--epochs", "2"]
        all_succeed(command, arguments, count=count, log=tmp_path / f"p{count}.log")
        runs[count] = tmp_path / "runs" / f"p{count}"
    one, two = weights(runs[1], "weights", "old"), weights(runs[2], "weights", "old")
    assert_trained_alike(one, two)
    for row, other in zip(reproducible(runs[1]), reproducible(runs[2]), strict=True):
        for key in ("reward/mean", "policy/distance_to_reference", "optimizer/grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=1e-3), key


def trained(policy: Policy, objective: CleanSampleConfig, folder: Path) -> dict[str, float]:
    """The last row of two short epochs."""
    config = Config(
        adapter=LoraConfig(rank=2) if isinstance(policy.adapter, LoraConfig) else FullConfig(),
        objective=objective,
        batch=BatchConfig(samples_per_epoch=4, group_size=2, sample_batch_size=4, train_batch_size=4),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(num_prompts=1, images_per_prompt=2, every_epochs=0),
        checkpoints=CheckpointConfig(every_epochs=0),
        tracking=TrackingConfig(trackers=(), pictures_every_epochs=0),
        run=RunConfig(output_dir=str(folder)),
        epochs=2,
    )
    run = train(policy, reward=lambda images, prompts, metadata: images.mean((1, 2, 3)), prompts=PROMPTS, config=config)
    assert list((run / "lora").rglob("*.safetensors"))
    return read_metrics(run)[-1]


@pytest.mark.parametrize("preset", ["raft", "ram", "tilt_matching", "nft_published", "awm", "dgpo"])
def test_every_method_moves_the_policy(preset: str, tmp_path: Path) -> None:
    policy = make("sd1", "ode")
    before = {name: value.detach().clone() for name, value in policy.trainable().items()}
    row = trained(policy, CleanSampleConfig(preset=preset, noises=2), tmp_path)
    assert row["optimizer/grad_norm"] > 0 and row["policy/regression_error"] > 0
    assert any(not torch.equal(before[name], value) for name, value in policy.trainable().items())


@pytest.mark.parametrize(
    ("family", "shipped"), [("sdxl", None), ("sd3", "sd35_nft"), ("sd3", "sd35_ram"), ("flux", "flux_awm")]
)
def test_other_families_train_in_their_own_parametrisation_with_the_shipped_settings(
    family: str, shipped: str | None, tmp_path: Path
) -> None:
    spec = FAMILIES[family]
    objective = CleanSampleConfig(preset="nft") if shipped is None else load_config(shipped).objective
    assert isinstance(objective, CleanSampleConfig)
    sampler = SamplerConfig(kind="ode", num_steps=3, guidance_scale=spec.guidance, **spec.options)
    adapter = FullConfig() if family == "flux" else LoraConfig(rank=2)
    policy = Policy(spec.build(), sampler=sampler, adapter=adapter, precision="bf16" if family == "sd3" else "fp32")
    row = trained(policy, replace(objective, noises=2), tmp_path)
    assert row["optimizer/grad_norm"] > 0 and row["policy/distance_to_reference"] > 0
    assert row["policy/regression_error"] < 10, "targets are in the network's own units"


def test_frozen_passes_are_planned(config: Path) -> None:
    plan = make_plan(load_config(config), num_processes=1, num_stochastic=0)
    assert plan.sampling_rows == 8 * 3 * 2 and plan.training_rows == 8 * 3
    assert plan.reference_rows == 2 * plan.training_rows, "the old and the pretrained weights"
    weighted = load_config(config, ["--objective.reference_weight", "0"])
    assert make_plan(weighted, num_processes=1, num_stochastic=0).reference_rows == plan.training_rows


def test_a_unit_of_a_group_is_planned_with_the_rows_of_all_its_samples(config: Path) -> None:
    loaded = load_config(config, ["--objective.preset", "dgpo", "--objective.old_rate", "null"])
    plan = make_plan(loaded, num_processes=1, num_stochastic=0)
    assert plan.training_rows == 8 * 3 * 2 and plan.reference_rows == plan.training_rows
    assert "group noises" in plan.describe()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--objective.temperature", "1"), "objective.temperature: must be null with worth: advantage"),
        (("--objective.worth", "exponential"), "objective.target: must be sample with worth: exponential"),
        (("--objective.target", "sample"), "objective.old_rate: must be .*"),
        (("--objective.clip", ".inf", "--objective.target", "contrast"), "objective.clip: must be finite"),
        (("--objective.skip_steps", "3"), "sampler.num_steps: must be at least 4 with objective.kind: clean_sample"),
        (("--kl.alpha", "0.1"), "kl.alpha: must be 0 with objective.kind: clean_sample"),
    ],
)
def test_contradictions_are_refused_before_weights_load(config: Path, overrides: tuple[str, ...], message: str) -> None:
    if "sample" in overrides:
        overrides = (*overrides, "--objective.sample_from", "policy")
    with pytest.raises(ConfigError, match=message):
        load_config(config, overrides)
