"""Preferences through the whole trainer: what it needs, what it refuses, resumes, processes and families."""

from pathlib import Path

import pytest
import torch

from ddpo import FullConfig, LoraConfig, Policy, SamplerConfig
from ddpo.objectives.preference import PreferenceConfig
from tests.ddpo.families import tiny_flux, tiny_sd3, tiny_sdxl
from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import assert_trained_alike, reproducible, start, weights, write_config
from tests.trainers.world import all_succeed, command
from trainers.config import Config
from trainers.config.groups import (
    BatchConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
)
from trainers.config.io import ConfigError, load_config
from trainers.loop import resume, train
from trainers.planning.plan import PlanError, make_plan
from trainers.planning.preflight import preflight
from trainers.run_folder.folder import read_metrics

BASE = """\
model: {{path: {model}}}
adapter: {{rank: 2}}
sampler: {{kind: {sampler}, num_steps: 3, guidance_scale: 2.0}}
objective: {objective}
batch: {{samples_per_epoch: 8, group_size: 2, sample_batch_size: 5, train_batch_size: 5}}
optimizer: {{learning_rate: 1e-3, ema_decay: 0.9}}
rewards: [{{name: brightness}}]
prompts: {{source: {prompts}}}
evaluation: {{num_prompts: 1, images_per_prompt: 2, every_epochs: 0, ode: false}}
checkpoints: {{every_epochs: 1, keep_last: 10}}
tracking: {{trackers: [], pictures_every_epochs: 0}}
run: {{output_dir: {output}}}
epochs: 2
"""
OBJECTIVES = {
    "dpo": "{kind: preference, beta: 500, noises: 3, updates_per_epoch: 2}",
    "kto": "{kind: preference, preset: kto, beta: 500, noises: 2, inner_epochs: 2}",
    "d3po": "{kind: preference, preset: d3po, beta: 10, updates_per_epoch: 2}",
    "spo": "{kind: preference, preset: spo, margin: 0, first_step: 1, contenders: 2}",
}


def write(folder: Path, model: Path, preset: str) -> Path:
    write_config(folder, model)  # for its prompts
    file = folder / f"{preset}.yaml"
    text = BASE.format(
        model=model, sampler="ddim" if preset in ("d3po", "spo") else "ode", objective=OBJECTIVES[preset],
        prompts=folder / "prompts.txt", output=folder / "runs",
    )  # fmt: skip
    file.write_text(text)
    return file


@pytest.mark.parametrize("preset", ["dpo", "spo"])
def test_a_resume_is_bit_exact_and_the_rows_say_what_was_learnt(preset: str, model: Path, tmp_path: Path) -> None:
    config = write(tmp_path, model, preset)
    whole = start(config, "--run.name", "whole")
    parts = start(config, "--run.name", "parts", "--epochs", "1")
    resume(parts, ["--epochs", "2"])
    groups = ("weights", "optimizer", "ema")
    first, second = weights(whole, *groups), weights(parts, *groups)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert reproducible(whole) == reproducible(parts)
    row = read_metrics(whole)[-1]
    assert row["optimizer/grad_norm"] > 0
    assert 0 < row["policy/pair_accuracy"] <= 1 and row["policy/pairs_skipped"] == 0
    assert ("policy/gate_nats" in row) == (preset == "spo")
    assert max(float(value.abs().max()) for name, value in first.items() if "lora_B" in name) > 1e-4


@pytest.mark.parametrize("preset", ["dpo", "kto"])
def test_two_processes_train_as_one(preset: str, model: Path, tmp_path: Path) -> None:
    config, runs = write(tmp_path, model, preset), {}
    for count, size in ((1, "5"), (2, "4")):
        arguments = ["train", str(config), "--run.name", f"p{count}", "--epochs", "2", "--batch.train_batch_size", size]
        all_succeed(command, arguments, count=count, log=tmp_path / f"p{count}.log")
        runs[count] = tmp_path / "runs" / f"p{count}"
    one, two = weights(runs[1], "weights"), weights(runs[2], "weights")
    assert_trained_alike(one, two)
    for row, other in zip(reproducible(runs[1]), reproducible(runs[2]), strict=True):
        learnt = [key for key in row if key.startswith("policy/") and key != "policy/gate_nats"]  # which is rounding
        for key in (*learnt, "optimizer/grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=1e-2, abs=1e-4), key


@pytest.mark.parametrize(
    ("build", "sampler", "adapter", "precision", "preset"),
    [
        (tiny_sdxl, "ddim", LoraConfig(rank=2), "fp32", "dpo"),
        (tiny_sd3, "flow_sde", FullConfig(), "fp32", "d3po"),
        (tiny_flux, "flow_sde", LoraConfig(rank=2), "fp32", "dpo"),
        (tiny_stable_diffusion, "ddim", FullConfig(), "bf16", "kto"),
    ],
    ids=["sdxl lora dpo", "sd3 full d3po", "flux lora dpo", "sd full bf16 kto"],
)
def test_it_trains_every_family_from_python(build, sampler, adapter, precision, preset, tmp_path: Path) -> None:
    policy = Policy(
        build(), sampler=SamplerConfig(kind=sampler, num_steps=2, guidance_scale=2.0), adapter=adapter,
        precision=precision,
    )  # fmt: skip
    config = Config(
        model=ModelConfig(precision=precision),
        objective=PreferenceConfig(preset=preset, margin=0.0),
        batch=BatchConfig(samples_per_epoch=4, group_size=2, sample_batch_size=4, train_batch_size=2),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(num_prompts=1, images_per_prompt=1, ode=False, every_epochs=0),
        tracking=TrackingConfig(trackers=(), pictures_every_epochs=0),
        run=RunConfig(output_dir=str(tmp_path)),
        epochs=2,
    )
    before = {name: value.detach().clone() for name, value in policy.trainable().items()}
    run = train(policy, reward="brightness", prompts=["a cat", "a dog"], config=config)
    first, second = read_metrics(run)
    assert first["optimizer/grad_norm"] > 0 and second["optimizer/skipped"] == 0
    if preset != "kto":
        assert first["policy/pair_accuracy"] == 0.5, "the policy is the pretrained model, bit by bit"
        assert first["policy/pair_logit"] == 0.0
    assert any(not torch.equal(before[name], value) for name, value in policy.trainable().items())


def test_what_a_pair_costs_is_planned(model: Path, tmp_path: Path) -> None:
    plan = make_plan(load_config(write(tmp_path, model, "dpo")), num_processes=1, num_stochastic=0)
    assert plan.units_per_update == (16, 8)
    assert plan.training_rows == 8 * 3 * 2 == plan.reference_rows, "two images a noise, without guidance"
    assert "3 of 3 pair noises per image" in plan.describe()
    steps = make_plan(load_config(write(tmp_path, model, "d3po")), num_processes=1, num_stochastic=3)
    contests = make_plan(load_config(write(tmp_path, model, "spo")), num_processes=1, num_stochastic=3)
    assert contests.units_per_sample == 2 and contests.sampling_rows == 8 * (3 + 2 * 2) * 2
    assert steps.units_per_sample == 2 and steps.training_rows == 8 * 2 * 2 * 2, "guided, a pair's steps shared out"


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("dpo", ("--kl.alpha", "0.1"), "kl.alpha: must be 0 with objective.kind: preference"),
        (
            "dpo",
            ("--batch.group_size", "1", "--advantages.baseline", "batch"),
            "batch.group_size: must be at least 2 with objective.preset: dpo",
        ),
        ("dpo", ("--objective.preset", "ipo"), "objective.preset: must be"),
        ("dpo", ("--shaping.steps", "[1]"), r"shaping.steps: must be \[\] with objective.kind: preference"),
        ("d3po", ("--sampler.kind", "ode"), "sampler.kind: must be a stochastic sampler with objective.kind: pref"),
        ("d3po", ("--objective.draws", "2"), "objective.draws: must be 1 with preset: d3po"),
        ("spo", ("--objective.first_step", "3"), "sampler.num_steps: must be more than objective.first_step"),
    ],
)
def test_what_it_cannot_use_is_refused_before_weights_load(
    preset: str, overrides: tuple[str, ...], message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, model, preset), overrides)


def test_groups_on_two_processes_are_refused_before_weights_load(model: Path, tmp_path: Path) -> None:
    config = load_config(write(tmp_path, model, "dpo"), ["--batch.samples_per_epoch", "6"])
    with pytest.raises(PlanError, match=r"multiple of 4 .* with an objective that compares the images of a group"):
        preflight(config, num_processes=2, here=False)
    assert preflight(config, num_processes=3, here=False).whole_groups
