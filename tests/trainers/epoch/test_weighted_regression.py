"""An algorithm without likelihoods through the whole trainer: what it needs, what it refuses, resumes and processes."""

from pathlib import Path

import pytest
import torch

from tests.trainers.loop_helpers import assert_trained_alike, reproducible, start, weights, write_config
from tests.trainers.world import all_succeed, command
from trainers.config.io import ConfigError, load_config
from trainers.loop import resume
from trainers.planning.plan import make_plan
from trainers.run_folder.folder import read_metrics
from trainers.verification.optimum import REGRESSION_BAR, check_regression

BASE = """\
model: {{path: {model}}}
adapter: {{rank: 2}}
sampler: {{kind: {sampler}, num_steps: 3, guidance_scale: 2.0}}
objective: {{kind: clean_sample, preset: rwr, temperature: 5.0, noises: 3, updates_per_epoch: 2, inner_epochs: 2}}
batch: {{samples_per_epoch: 8, group_size: 2, sample_batch_size: 3, train_batch_size: 5}}
optimizer: {{learning_rate: 1e-3, ema_decay: 0.9}}
rewards: [{{name: brightness}}]
prompts: {{source: {prompts}}}
evaluation: {{num_prompts: 2, images_per_prompt: 2, every_epochs: 0}}
checkpoints: {{every_epochs: 1, keep_last: 10}}
tracking: {{trackers: [], pictures_every_epochs: 2, num_pictures: 4}}
run: {{output_dir: {output}}}
epochs: 3
"""


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    write_config(tmp_path, model)  # for its prompts
    file = tmp_path / "rwr.yaml"
    file.write_text(BASE.format(model=model, sampler="ode", prompts=tmp_path / "prompts.txt", output=tmp_path / "runs"))
    return file


def test_it_trains_on_the_ode_and_a_resume_is_bit_exact(config: Path) -> None:
    whole = start(config, "--run.name", "whole")
    parts = start(config, "--run.name", "parts", "--epochs", "1")
    resume(parts, ["--epochs", "3"])
    groups = ("weights", "optimizer", "ema")
    first, second = weights(whole, *groups), weights(parts, *groups)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert reproducible(whole) == reproducible(parts)
    row = read_metrics(whole)[-1]
    assert row["optimizer/grad_norm"] > 0 and row["policy/regression_error"] > 0
    assert row["policy/weight_squared"] > 1, "samples count differently"
    assert len(row["per_step/regression_error"]) == 3
    assert not [name for name in row if "gate" in name or "clip_fraction" in name or name == "kl/path_nats"]
    assert max(float(value.abs().max()) for name, value in first.items() if "lora_B" in name) > 1e-4


def test_two_processes_train_as_one(config: Path, tmp_path: Path) -> None:
    runs = {}
    for count in (1, 2):
        arguments = ["train", str(config), "--run.name", f"p{count}", "--epochs", "2"]
        all_succeed(command, arguments, count=count, log=tmp_path / f"p{count}.log")
        runs[count] = tmp_path / "runs" / f"p{count}"
    one, two = weights(runs[1], "weights"), weights(runs[2], "weights")
    assert_trained_alike(one, two)
    for row, other in zip(reproducible(runs[1]), reproducible(runs[2]), strict=True):
        for key in ("reward/mean", "policy/regression_error", "policy/weight_squared", "optimizer/grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=1e-3), key


def test_only_clean_latents_are_kept_and_planned_for(config: Path) -> None:
    loaded = load_config(config)
    plan = make_plan(loaded, num_processes=1, num_stochastic=0)
    assert plan.units_per_update == (16, 8) and plan.optimizer_steps_per_epoch == 4
    assert plan.sampling_rows == 8 * 3 * 2 and plan.training_rows == 8 * 3 * 2 * 2 and plan.reference_rows == 0
    assert "3 of 3 noises per image; 2 updates x 2 inner epochs, per image and update: 2 + 1" in plan.describe()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--kl.alpha", "0.1"), "kl.alpha: must be 0 with objective.kind: clean_sample"),
        (("--kl.kind", "adaptive", "--kl.target", "1"), "kl.alpha: must be 0 with objective.kind: clean_sample"),
        (("--shaping.steps", "[1]"), r"shaping.steps: must be \[\] with objective.kind: clean_sample"),
        (("--objective.preset", "raw"), "objective.preset: must be"),
    ],
)
def test_what_it_cannot_use_is_refused_before_weights_load(
    config: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config, overrides)


def test_a_policy_gradient_on_the_ode_is_refused_before_weights_load(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"sampler.kind: must be a stochastic sampler with objective.kind: policy_gr"):
        load_config("shapes_ppo", ["--sampler.kind", "ode"])


def test_one_converged_round_is_the_denoiser_of_the_tilted_law() -> None:
    (row,) = check_regression()
    assert row.error < REGRESSION_BAR
