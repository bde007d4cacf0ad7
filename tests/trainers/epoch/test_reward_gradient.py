"""Learning through the reward with the whole trainer: resumes, processes, precisions, families, plans, refusals."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpo import FullConfig, LoraConfig, Policy, SamplerConfig
from ddpo.credit.kl import FixedKL
from ddpo.objectives.reward_gradient import RewardGradientConfig
from rewards import WeightedSum
from rewards.reward import Reward
from tests.ddpo.test_families import PROMPTS, make
from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import assert_trained_alike, reproducible, start, weights, write_config
from tests.trainers.world import all_succeed, command
from trainers.config import Config
from trainers.config.groups import BatchConfig, EvaluationConfig, OptimizerConfig, RunConfig, TrackingConfig
from trainers.config.io import ConfigError, load_config
from trainers.epoch.step_rules import DivergedError
from trainers.loop import resume, train
from trainers.planning.plan import expected_plan, make_plan
from trainers.planning.preflight import preflight
from trainers.run_folder.folder import read_metrics

BASE = """\
model: {{path: {model}}}
adapter: {{rank: 2}}
sampler: {{num_steps: 3, guidance_scale: 2.0}}
objective: {{kind: reward_gradient, preset: alignprop}}
kl: {{alpha: 0.1}}
batch: {{samples_per_epoch: 5, group_size: 1, sample_batch_size: 3, train_batch_size: 2}}
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


def test_a_resume_is_bit_exact_and_what_people_look_at_is_logged(config: Path) -> None:
    whole = start(config, "--run.name", "whole")
    parts = start(config, "--run.name", "parts", "--epochs", "1")
    resume(parts, ["--epochs", "3"])
    groups = ("weights", "optimizer", "ema")
    first, second = weights(whole, *groups), weights(parts, *groups)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert reproducible(whole) == reproducible(parts)
    rows = read_metrics(whole)
    assert all(row["policy/gate_nats"] < 1e-6 and row["optimizer/grad_norm"] > 0 for row in rows)
    assert rows[-1]["policy/graph_kl_nats"] > 0 and 1 <= rows[-1]["policy/graph_steps"] <= 3
    # The total that is differentiated is the one that is reported, in the same unit.
    assert all(row["policy/reward"] == pytest.approx(row["reward/mean"], rel=1e-5) for row in rows)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one(config: Path, tmp_path: Path, strategy: str) -> None:
    runs = {}
    for count in (1, 2):
        name = f"{strategy}{count}"
        arguments = ["train", str(config), "--run.name", name, "--epochs", "2", "--objective.preset", "draft",
                     "--distributed.strategy", strategy]  # fmt: skip
        all_succeed(command, arguments, count=count, log=tmp_path / f"{name}.log")
        runs[count] = tmp_path / "runs" / name
    one, two = weights(runs[1], "weights"), weights(runs[2], "weights")
    assert_trained_alike(one, two)
    for row, other in zip(reproducible(runs[1]), reproducible(runs[2]), strict=True):
        for key in ("reward/mean", "policy/reward", "optimizer/grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=1e-3), key


def small(folder: Path, **changes: object) -> Config:
    options = {
        "adapter": LoraConfig(rank=2),
        "objective": RewardGradientConfig(),
        "batch": BatchConfig(samples_per_epoch=4, group_size=1, sample_batch_size=4, train_batch_size=3),
        "optimizer": OptimizerConfig(learning_rate=1e-3),
        "evaluation": EvaluationConfig(num_prompts=1, images_per_prompt=2, ode=False),
        "tracking": TrackingConfig(trackers=(), pictures_every_epochs=0),
        "run": RunConfig(output_dir=str(folder), name="run"),
        "epochs": 1,
        **changes,
    }
    return Config(**options)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_every_family_is_differentiated_through_its_chain(family: str, tmp_path: Path) -> None:
    (row,) = read_metrics(train(make(family), reward="brightness", prompts=list(PROMPTS), config=small(tmp_path)))
    assert row["policy/gate_nats"] < 1e-6 and row["optimizer/grad_norm"] > 0


@pytest.mark.parametrize("adapter", [LoraConfig(rank=2), FullConfig()], ids=["lora", "full"])
def test_it_trains_in_bfloat16(adapter: LoraConfig | FullConfig, tmp_path: Path) -> None:
    sampler = SamplerConfig(num_steps=3, guidance_scale=2.0)
    policy = Policy(tiny_stable_diffusion(), sampler=sampler, adapter=adapter, precision="bf16")
    config = small(tmp_path, adapter=adapter, kl=FixedKL(alpha=0.1), epochs=2)
    rows = read_metrics(train(policy, reward="brightness", prompts=list(PROMPTS), config=config))
    assert all(row["policy/gate_nats"] < 1e-3 * 4 * 16 * 16 and row["optimizer/grad_norm"] > 0 for row in rows)


def tiny_policy() -> Policy:
    sampler = SamplerConfig(num_steps=3, guidance_scale=1.0)
    return Policy(tiny_stable_diffusion(), sampler=sampler, adapter=LoraConfig(rank=2))


def bright(images: Tensor, prompts: object, metadata: object) -> Tensor:
    return images.mean((1, 2, 3))


def summed(*rewards: tuple[str, object, bool]) -> WeightedSum:
    return WeightedSum.of(
        *(Reward(name=name, function=each, differentiable=gradient) for name, each, gradient in rewards)
    )


def test_beside_a_differentiable_reward_another_is_measured_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def size(images: Tensor, prompts: object, metadata: object) -> Tensor:
        return -images.detach().flatten(1).std(1)

    mixed = summed(("bright", bright, True), ("size", size, False))
    policies = tiny_policy(), tiny_policy()
    run = train(policies[0], reward=mixed, prompts=list(PROMPTS), config=small(tmp_path / "mixed"))
    told = "draft learns through bright alone: size counts in the reported total, has no gradient and trains nothing"
    assert told in capsys.readouterr().err
    train(policies[1], reward=summed(("bright", bright, True)), prompts=list(PROMPTS), config=small(tmp_path / "one"))
    one, other = (policy.trainable() for policy in policies)
    assert all(torch.equal(one[name], other[name]) for name in one)
    (row,) = read_metrics(run)
    assert row["reward/mean"] == pytest.approx(row["reward/bright"] + row["reward/size"], rel=1e-5)


def test_a_reward_whose_gradient_is_nan_is_named_and_its_updates_are_skipped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def root(images: Tensor, prompts: list[str], metadata: object) -> Tensor:
        """0 everywhere; for the second prompt as the root of 0, which has no slope."""
        zeros = 0 * images.mean((1, 2, 3))
        return torch.stack(
            [zero.sqrt() if prompt == PROMPTS[1] else zero for zero, prompt in zip(zeros, prompts, strict=True)]
        )

    policy = tiny_policy()
    before = {name: value.detach().clone() for name, value in policy.trainable().items()}
    mixed = summed(("bright", bright, True), ("root", root, True))
    with pytest.raises(DivergedError, match="not finite in 3 updates in a row"):
        train(policy, reward=mixed, prompts=list(PROMPTS), config=small(tmp_path, epochs=4))
    said = capsys.readouterr().err
    assert f"the gradient of reward 'root' is not finite for the prompt {PROMPTS[1]!r}: this update is skipped" in said
    assert "of reward 'bright'" not in said
    rows = read_metrics(tmp_path / "run")
    assert [row["optimizer/skipped"] for row in rows] == [1, 1]
    assert all(torch.equal(before[name], value) for name, value in policy.trainable().items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--rewards", "[{name: jpeg_compressibility}]"), "rewards: jpeg_compressibility must be differentiable"),
        (("--rewards", "[{name: brightness}, {name: diversity}]"), "rewards: diversity must compare no images"),
        (("--reward_processes.devices", "[cpu]"), r"reward_processes.devices: must be \[\] with the objective align"),
        (("--shaping.steps", "[1]"), r"shaping.steps: must be \[\] with objective.kind: reward_gradient"),
        (("--sampler.kind", "ode"), "kl.alpha: must be 0 .* .steps without noise have no KL"),
        (("--advantages.combination", "gdpo"), "advantages.combination: must be sum with objective.kind: reward_gr"),
        (("--constraints", "[{reward: brightness, at_most: 1}]"), r"constraints: must be \[\] but for kl"),
        (("--distributed.strategy", "fsdp"), "distributed.strategy: must be ddp with the objective alignprop"),
        (("--objective.preset", "drft"), "objective.preset: must be"),
        (("--objective.train_guidance", "none"), "objective.train_guidance"),
    ],
)
def test_what_it_cannot_use_is_refused_before_weights_load(
    config: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight(load_config(config, overrides), num_processes=1)


def test_rows_are_those_of_the_steps_with_a_graph(config: Path) -> None:
    def rows(*overrides: str) -> tuple[int, int, int]:
        plan = make_plan(load_config(config, overrides), num_processes=1, num_stochastic=3)
        return plan.sampling_rows, plan.training_rows, plan.reference_rows

    few = 1 * 2  # the KL that is only logged, at one site
    assert rows("--objective.preset", "draft") == (5 * 3 * 2, 5 * 3 * 2, 5 * 3 * 2 + few)
    assert rows("--objective.preset", "draft", "--objective.last_steps", "2")[1] == 5 * 2 * 2
    assert rows("--objective.preset", "draft_lv", "--kl.alpha", "0")[1:] == (5 * (1 + 2) * 2, few)
    adaptive = ("--objective.preset", "draft", "--kl.kind", "adaptive", "--kl.target", "1", "--kl.alpha", "null")
    assert rows(*adaptive)[2] == 2 * 5 * 3 * 2
    assert "denoiser rows up to" in expected_plan(load_config(config), num_processes=1).describe()
