"""A critic through the whole trainer: resumes, processes, heads, what is exported, families, refusals, plans."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddpo import LoraConfig
from ddpo.credit.advantages import AdvantageConfig
from ddpo.credit.critic import Critic, CriticConfig
from ddpo.credit.lagrangian import Constraint
from ddpo.objectives import PolicyGradientConfig
from ddpo.validation import UserError
from tests.ddpo.test_families import PROMPTS, make
from tests.trainers.loop_helpers import assert_trained_alike, reproducible, start, weights, write_config
from tests.trainers.world import all_succeed, command
from trainers.config import Config
from trainers.config.groups import BatchConfig, EvaluationConfig, OptimizerConfig, RunConfig, TrackingConfig
from trainers.config.io import ConfigError, load_config
from trainers.loop import resume, train
from trainers.run_folder.folder import read_metrics

CRITIC = """\
advantages: {baseline: critic, gae_lambda: 0.9}
critic: {kind: network, width: 16, warmup_epochs: 1, updates_per_epoch: 4, batch_size: 3, learning_rate: 3e-3}
"""
GROUPS = ("weights", "optimizer", "ema", "critic.weights", "critic.optimizer")


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path, model, extra=CRITIC)


def test_a_resume_is_bit_exact_with_a_critic_that_is_warm(config: Path) -> None:
    whole = start(config, "--run.name", "whole")
    parts = start(config, "--run.name", "parts", "--epochs", "2")
    resume(parts, ["--epochs", "3"])
    first, second = weights(whole, *GROUPS), weights(parts, *GROUPS)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert reproducible(whole) == reproducible(parts)
    cold, *warm = read_metrics(whole)
    assert "advantages/variance_ratio" not in cold and all(row["advantages/variance_ratio"] > 0 for row in warm)
    assert all(row["critic/loss"] > 0 and row["critic/grad_norm"] > 0 for row in (cold, *warm))
    assert all(len(row["per_step/explained_variance"]) == 3 and row["critic/value_error"] > 0 for row in warm)


def test_the_critic_is_exported_beside_the_lora_as_it_was_trained(config: Path) -> None:
    run = start(config, "--epochs", "2")
    critic = Critic.read(run / "lora")
    assert critic.shape.heads == ("brightness", "kl") and critic.shape.num_steps == 3
    saved = weights(run, "critic.weights")
    assert all(torch.equal(value, saved[f"critic.weights.{name}"]) for name, value in critic.state_dict().items())
    assert float(critic.std.min()) > 0, "the KL has differed by the second epoch"
    assert (run / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_two_processes_train_policy_and_critic_as_one(config: Path, tmp_path: Path) -> None:
    runs = {}
    for count in (1, 2):
        arguments = ["train", str(config), "--run.name", f"p{count}", "--epochs", "3"]
        all_succeed(command, arguments, count=count, log=tmp_path / f"p{count}.log")
        runs[count] = tmp_path / "runs" / f"p{count}"
    assert_trained_alike(weights(runs[1], "weights"), weights(runs[2], "weights"))
    one, two = weights(runs[1], "critic.weights"), weights(runs[2], "critic.weights")
    apart = torch.cat([(one[name] - two[name]).flatten() for name in one]).norm()
    assert float(apart) < 1e-3 * float(torch.cat([value.flatten() for value in one.values()]).norm())
    for row, other in zip(reproducible(runs[1]), reproducible(runs[2]), strict=True):
        for key in ("critic/loss", "critic/value_error", "critic/grad_norm", "reward/mean"):
            assert row[key] == pytest.approx(other[key], rel=1e-3), key


def brightness(images: torch.Tensor, prompts: list[str], metadata: list) -> dict[str, torch.Tensor]:
    return {"score": images.mean((1, 2, 3)), "red": images[:, 0].mean((1, 2))}


def options(folder: Path, **others: object) -> Config:
    return Config(
        adapter=LoraConfig(rank=2),
        objective=PolicyGradientConfig(ratio="joint", updates_per_epoch=1),
        advantages=AdvantageConfig(baseline="critic"),
        critic=CriticConfig(kind="network", width=16, warmup_epochs=1, updates_per_epoch=3, batch_size=5),
        batch=BatchConfig(samples_per_epoch=4, group_size=1, sample_batch_size=4, train_batch_size=3),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(num_prompts=1, images_per_prompt=2, ode=False, every_epochs=0),
        tracking=TrackingConfig(trackers=()),
        run=RunConfig(output_dir=str(folder)),
        epochs=2,
        **others,
    )


@pytest.mark.parametrize("kind", ["network", "features"])
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_other_families_train_with_groups_of_one(family: str, kind: str, tmp_path: Path) -> None:
    policy = make(family)
    config = options(tmp_path)
    config = replace(config, critic=replace(config.critic, kind=kind))
    run = train(policy, reward=brightness, prompts=PROMPTS, config=config)
    _, row = read_metrics(run)
    assert row["optimizer/grad_norm"] > 0 and row["critic/grad_norm"] > 0
    critic = Critic.read(run / "lora")
    assert critic.shape.prompt_size > 0
    assert (critic.shape.state == policy.latent_shape) == (kind == "network")


def test_features_are_not_read_of_a_pipeline_that_calls_its_denoiser_for_some_samples_at_a_time(tmp_path: Path) -> None:
    config = options(tmp_path)
    config = replace(config, critic=replace(config.critic, kind="features"))
    policy = make("sd1")
    policy.denoiser.one_row = True
    with pytest.raises(UserError, match="critic.kind must be network with this pipeline, got features"):
        train(policy, reward=brightness, prompts=PROMPTS, config=config)


def test_what_a_constraint_bounds_has_a_head_and_its_multiplier_moves_without_relearning(tmp_path: Path) -> None:
    bound = Constraint(reward="brightness/red", at_least=0.9, penalty=2.0)
    config = options(tmp_path, constraints=(bound,))
    run = train(make("sd1"), reward=brightness, prompts=PROMPTS, config=config)
    assert Critic.read(run / "lora").shape.heads == ("brightness", "brightness/red")
    rows = read_metrics(run)
    assert rows[0]["constraint/brightness/red/multiplier"] != rows[1]["constraint/brightness/red/multiplier"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--critic.kind", "none"), "critic.kind: must be network or features with advantages.baseline: critic"),
        (("--advantages.baseline", "group", "--advantages.gae_lambda", "null"), "critic.kind: must be none without"),
        (
            ("--critic.kind", "features", "--model.compile", "true"),
            "critic.kind: must be network with model.compile",
        ),
        (("--shaping.steps", "[1]"), r"shaping.steps: must be \[\] with advantages.baseline: critic"),
        (("--rewards.0.normalize", "prompt_zscore"), "rewards.0.normalize: must be none, std or zscore"),
        (("--batch.group_noise", "antithetic"), "batch.group_size: must be at least 4"),
    ],
)
def test_contradictions_are_refused_before_weights_load(config: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config, overrides)


def test_an_objective_whose_steps_are_worth_the_same_has_no_use_for_a_critic(model: Path, tmp_path: Path) -> None:
    text = write_config(tmp_path, model, extra=CRITIC)
    text.write_text(
        text.read_text()
        .replace("{ratio: joint, updates_per_epoch: 2, step_fraction: 1.0}", "{kind: clean_sample, preset: nft}")
        .replace("{kind: adaptive, target: 0.01, alpha: 0.01}", "{alpha: 0}")
    )
    with pytest.raises(ConfigError, match="advantages.baseline: must be group, prompt or batch with objective.kind"):
        load_config(text)
