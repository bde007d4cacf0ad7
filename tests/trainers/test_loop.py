"""The training loop on a tiny random pipeline: what a run leaves, and that it can be stopped at any point."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import trainers.epoch.binding
import trainers.epoch.sample
import trainers.loop
from ddpo import LoraConfig, Policy, SamplerConfig, rollout, sample_seeds
from rewards import RewardError
from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import ROOT, assert_trained_alike, environment, reproducible, weights, write_config
from tests.trainers.world import all_succeed, command, in_processes
from trainers.config import Config
from trainers.config.groups import BatchConfig, EvaluationConfig, RunConfig, TrackingConfig
from trainers.config.io import load_config, to_yaml
from trainers.epoch.drift import GateError, check_drift
from trainers.epoch.learning_rate import rate_factor
from trainers.epoch.step_rules import DivergedError
from trainers.loop import resume, train, train_from_config
from trainers.parallel.processes import Processes
from trainers.run_folder.checkpoint import list_checkpoints
from trainers.run_folder.folder import read_metrics
from trainers.scoring.non_finite import ImageError
from trainers.tracking.metrics import StepMean, StepMeans
from trainers.tracking.pictures import caption, grid


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny-sd"
    tiny_stable_diffusion().save_pretrained(folder, safe_serialization=True)
    return folder


def start(config: Path, *overrides: str) -> Path:
    loaded = load_config(config, overrides)
    return train_from_config(loaded, config_yaml=to_yaml(loaded, full=True))


def small(**changes: object) -> Config:
    options = {
        "batch": BatchConfig(samples_per_epoch=4, group_size=2, sample_batch_size=4, train_batch_size=8),
        "evaluation": EvaluationConfig(num_prompts=1, images_per_prompt=2, ode=False),
        "tracking": TrackingConfig(trackers=(), pictures_every_epochs=0),
        "epochs": 1,
        **changes,
    }
    return Config(**options)


def tiny_policy(num_steps: int = 3) -> Policy:
    sampler = SamplerConfig(num_steps=num_steps, guidance_scale=1.0)
    return Policy(tiny_stable_diffusion(), sampler=sampler, adapter=LoraConfig(rank=2))


def test_a_run_leaves_everything_a_user_looks_for(model: Path, tmp_path: Path) -> None:
    run = start(write_config(tmp_path, model))
    expected = [
        "config.yaml", "environment.json", "metrics.jsonl", "pictures/epoch_000002.png", "before_after.png",
        "summary.txt", "summary.json", "curves.png", "report.html",
        "lora/pytorch_lora_weights.safetensors", "lora/README.md",
        "checkpoints/epoch_000003/pytorch_lora_weights.safetensors", "evaluations/epoch_000000.safetensors",
    ]  # fmt: skip
    assert [name for name in expected if not (run / name).is_file()] == []
    assert "<td>finished</td><td>3/3</td>" in (run / "report.html").read_text(encoding="utf-8")
    rows = read_metrics(run)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[0]["kl/path_nats"] == 0.0
    assert rows[-1]["kl/path_nats"] > 0.0
    assert max(rows[-1]["per_step/gate_nats"]) < 1e-2
    assert all(row["policy/step_kl_nats"] > 0.0 for row in rows)
    assert load_config(run / "config.yaml") == load_config(tmp_path / "tiny.yaml")


@pytest.mark.parametrize(
    ("path", "noisy"), [("shapes", 2), (None, 3)], ids=["last step without noise", "noise at every step"]
)
def test_the_plan_is_shown_again_where_the_loaded_pipeline_has_fewer_stochastic_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture, path: str | None, noisy: int
) -> None:
    sampler = SamplerConfig(num_steps=3, guidance_scale=1.0)
    policy = Policy.from_pretrained(path, sampler=sampler, adapter=LoraConfig(rank=2)) if path else tiny_policy()
    assert len(policy.schedule.stochastic_steps) == noisy
    train(policy, reward="brightness", prompts=["a red circle"], config=small(run=RunConfig(output_dir=str(tmp_path))))
    printed = capsys.readouterr().err
    assert ("training      2 of 2 stochastic steps per image" in printed) == (noisy == 2)
    assert ("now that the pipeline is loaded" in printed) == (noisy == 2)


def test_resume_is_bit_exact_in_weights_and_every_logged_number(model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, model)
    whole = start(config, "--run.name", "whole")
    parts = start(config, "--run.name", "parts", "--epochs", "1")
    resume(parts, ["--epochs", "3"])
    groups = ("weights", "optimizer", "ema")
    first, second = weights(whole, *groups), weights(parts, *groups)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert reproducible(whole) == reproducible(parts)


def test_kill_9_in_the_middle_of_an_epoch_then_resume_is_bit_exact(model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, model)
    whole = start(config, "--run.name", "whole", "--epochs", "4")
    train = [sys.executable, "-m", "trainers", "train", str(config), "--run.name", "killed", "--epochs", "4"]
    process = subprocess.Popen(train, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    killed = tmp_path / "runs" / "killed"
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "epoch_000002").is_dir():
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_metrics(killed)[-1]["epoch"] < 4, "the run was over before it was killed"
    all_succeed(command, ["train", "--resume", str(killed)], count=1, log=tmp_path / "resumed.log")
    first, second = weights(whole, "weights", "optimizer"), weights(killed, "weights", "optimizer")
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert reproducible(whole) == reproducible(killed)


def test_two_processes_train_as_one(model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, model, guidance=3.0)
    runs = {}
    for count in (1, 2):
        arguments = ["train", str(config), "--run.name", f"p{count}", "--epochs", "2"]
        all_succeed(command, arguments, count=count, log=tmp_path / f"p{count}.log")
        runs[count] = tmp_path / "runs" / f"p{count}"
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["p1", "p2"], "only rank 0 makes a folder"
    one, two = weights(runs[1], "weights"), weights(runs[2], "weights")
    assert_trained_alike(one, two)
    for row, other in zip(reproducible(runs[1]), reproducible(runs[2]), strict=True):
        for key in ("reward/mean", "kl/path_nats", "optimizer/grad_norm", "policy/clip_fraction"):
            assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize(
    "changes",
    [
        ("--objective.surrogate", "reinforce", "--objective.updates_per_epoch", "1"),
        ("--objective.train_guidance", "none", "--sampler.guidance_scale", "3"),
        ("--objective.inner_epochs", "2", "--objective.step_fraction", "0.7"),
        ("--adapter.kind", "full", "--kl.kind", "fixed", "--kl.alpha", "0"),
        ("--advantages.baseline", "prompt", "--advantages.min_count", "2", "--advantages.scale", "std"),
        ("--model.precision", "bf16", "--sampler.guidance_scale", "3"),
        ("--model.gradient_checkpointing", "true", "--model.offload", "true"),
    ],
    ids=lambda changes: " ".join(changes[:2]),
)
def test_every_option_runs_and_keeps_the_first_ratio_at_one(
    model: Path, tmp_path: Path, changes: tuple[str, ...]
) -> None:
    run = start(write_config(tmp_path, model), "--epochs", "2", *changes)
    rows = read_metrics(run)
    assert len(rows) == 2
    assert all(math.isfinite(row["optimizer/grad_norm"]) and row["optimizer/grad_norm"] > 0 for row in rows)
    dims = math.prod(tiny_policy().latent_shape)
    assert all(row["policy/gate_nats"] <= load_config(run / "config.yaml").gate_tolerance_nats * dims for row in rows)


def test_the_exported_lora_gives_our_images_in_the_stock_pipeline(model: Path, tmp_path: Path) -> None:
    run = start(write_config(tmp_path, model), "--adapter.alpha", "4", "--optimizer.ema_decay", "0")
    sampler = SamplerConfig(kind="ode", num_steps=3, guidance_scale=3.0)
    ours = Policy.from_pretrained(model, sampler=sampler, adapter=LoraConfig(rank=2, alpha=4), device="cpu")
    saved = weights(run, "weights")
    with torch.no_grad():
        for name, parameter in ours.trainable().items():
            parameter.copy_(saved[f"weights.{name}"])
    trajectory = rollout(ours, ours.encode(["a cat"]), sample_seeds(0, 0, range(1)))
    stock = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    stock.load_lora_weights(run / "lora")
    noise = trajectory.latents[:, 0]
    theirs = stock("a cat", num_inference_steps=3, guidance_scale=3.0, latents=noise, output_type="pt").images
    plain = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    untuned = plain("a cat", num_inference_steps=3, guidance_scale=3.0, latents=noise, output_type="pt").images
    assert float((theirs - ours.decode(trajectory.final)).abs().max()) < 1e-5
    assert float((theirs - untuned).abs().max()) > 1e-4


def test_the_gate_stops_a_run_whose_training_forward_is_not_its_sampling_forward(tmp_path: Path) -> None:
    policy = tiny_policy()
    exact = type(policy).__call__

    class Drifting(Policy):
        def __call__(self, k, x, condition):  # type: ignore[no-untyped-def]
            return exact(self, k, x + 0.05, condition)  # sampling makes its steps of the network's outputs

    policy.__class__ = Drifting
    with pytest.raises(GateError, match=r"differ from those of sampling by .* nats .*tolerance 1e-05"):
        train(
            policy,
            reward="brightness",
            prompts=["a cat", "a dog"],
            config=small(run=RunConfig(output_dir=str(tmp_path))),
        )


def test_three_non_finite_gradients_in_a_row_stop_the_run_and_keep_the_checkpoint(model: Path, tmp_path: Path) -> None:
    run = start(write_config(tmp_path, model), "--epochs", "1", "--kl.kind", "fixed")
    policy = tiny_policy()
    parameter = next(iter(policy.trainable().values()))
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    config = small(epochs=5, run=RunConfig(output_dir=str(tmp_path)))
    with pytest.raises(DivergedError, match="3 updates in a row"):
        train(policy, reward="brightness", prompts=["a cat", "a dog"], config=config)
    assert all(bool(torch.isfinite(value).all()) for value in policy.trainable().values())
    assert list_checkpoints(run) != []


def test_skipped_updates_are_counted_by_epoch(tmp_path: Path) -> None:
    """The first gradient of the first epoch is not finite; the second epoch skips nothing."""
    policy, seen = tiny_policy(), []

    def damage(gradient: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        return gradient * float("nan") if len(seen) == 1 else gradient

    next(iter(policy.trainable().values())).register_hook(damage)
    config = small(epochs=2, run=RunConfig(output_dir=str(tmp_path)))
    rows = read_metrics(train(policy, reward="brightness", prompts=["a cat", "a dog"], config=config))
    assert [row["optimizer/skipped"] for row in rows] == [1, 0]
    assert not any("policy/step_kl_nats" in row for row in rows), "without a weight no update computes the KL"


def test_an_epochs_pictures_are_of_all_its_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[Image.Image], list[str]]] = []

    def recorded(images: list[Image.Image], captions: list[str]) -> Image.Image:
        drawn.append((images, captions))
        return grid(images, captions)

    def corner(images, prompts, metadata):  # type: ignore[no-untyped-def]
        return 255 * images[:, 0, 0, 0]

    monkeypatch.setattr(trainers.loop, "grid", recorded)
    config = small(
        batch=BatchConfig(samples_per_epoch=8, group_size=2, sample_batch_size=3, train_batch_size=8),
        tracking=TrackingConfig(trackers=(), pictures_every_epochs=1, num_pictures=4),
        run=RunConfig(output_dir=str(tmp_path)),
    )
    train(tiny_policy(), reward=corner, prompts=["a cat", "a dog", "a bird", "a fish"], config=config)
    ((images, captions),) = drawn
    assert sorted(text.partition("\n")[0] for text in captions) == ["a bird", "a cat", "a dog", "a fish"]
    assert captions == [
        caption(text.partition("\n")[0], image.getpixel((0, 0))[0])
        for image, text in zip(images, captions, strict=True)
    ]


@pytest.mark.parametrize("where", [0, 1, 2])
def test_the_gate_sees_nan_where_a_step_was_measured_and_only_there(where: int) -> None:
    gate = torch.full((3,), 1e-9, dtype=torch.float64)
    gate[where] = float("nan")
    seen = torch.ones(3, dtype=torch.float64)
    with pytest.raises(GateError, match=f"by nan nats on average at step {where} "):
        check_drift(StepMean(mean=gate, count=seen), tolerance=1e-5, dims=10)
    seen[where] = 0.0
    check_drift(StepMean(mean=gate, count=seen), tolerance=1e-5, dims=10)
    gate[1 - min(where, 1)] = 1.0
    with pytest.raises(GateError, match="by 1 nats"):
        check_drift(StepMean(mean=gate, count=seen), tolerance=1e-5, dims=10)


def test_means_tell_a_step_that_was_not_seen_from_one_that_was_nan() -> None:
    means = StepMeans(3, torch.device("cpu"))
    means.add(
        torch.tensor([0, 0, 2]), {"a": torch.tensor([1.0, 2.0, float("nan")]), "b": torch.tensor([1.0, 2.0, 6.0])}
    )
    reduced = means.reduce(Processes(device="cpu"))
    assert reduced["a"].seen.tolist() == [True, False, True]
    assert reduced["b"].mean.nan_to_num(-1).tolist() == [1.5, -1, 6.0]
    assert math.isnan(reduced["a"].overall) and reduced["b"].overall == 3.0


def test_a_reward_that_fails_names_itself_and_the_prompt(tmp_path: Path) -> None:
    def fragile(images, prompts, metadata):  # type: ignore[no-untyped-def]
        return torch.tensor([float("nan") if "dog" in prompt else 1.0 for prompt in prompts])

    with pytest.raises(RewardError, match=r"fragile.*nan.*a dog"):
        train(
            tiny_policy(),
            reward=fragile,
            prompts=["a cat", "a dog"],
            config=small(run=RunConfig(output_dir=str(tmp_path))),
        )


@pytest.mark.parametrize(
    ("where", "message"),
    [("images", "the VAE gave them for finite latents.*bf16 or fp32"), ("latents", "their latents are so already")],
)
def test_images_that_are_not_finite_end_the_run_and_keep_the_finished_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, message: str
) -> None:
    policy, exact, real = tiny_policy(), Policy.decode, trainers.epoch.sample.rollout
    finished = iter([False, True])
    broken = False

    def decode(self, latents, **options):  # type: ignore[no-untyped-def]
        images = exact(self, latents, **options)
        return images.index_fill(0, torch.tensor([1]), math.nan) if broken else images

    def rollout_of_the_second_epoch(*arguments, **options):  # type: ignore[no-untyped-def]
        nonlocal broken
        broken = next(finished)
        trajectory = real(*arguments, **options)
        if broken and where == "latents":
            trajectory.latents[1, -1] = math.nan
        return trajectory

    monkeypatch.setattr(Policy, "decode", decode)
    monkeypatch.setattr(trainers.epoch.sample, "rollout", rollout_of_the_second_epoch)
    config = small(epochs=3, run=RunConfig(output_dir=str(tmp_path), name="nan"))
    with pytest.raises(ImageError, match=rf"1 of 4 images .* of prompt 'a (cat|dog)'; {message}"):
        train(policy, reward="brightness", prompts=["a cat", "a dog"], config=config)
    assert [row["epoch"] for row in read_metrics(tmp_path / "nan")] == [1]
    assert [path.name for path in list_checkpoints(tmp_path / "nan")] == ["epoch_000001"]


def test_images_that_are_not_finite_on_one_of_two_processes_stop_both_with_the_last_epoch_saved(tmp_path: Path) -> None:
    tiny_stable_diffusion().save_pretrained(tmp_path / "model", safe_serialization=True)
    config = write_config(tmp_path, tmp_path / "model")
    arguments = ["train", str(config), "--run.name", "nan"]
    statuses = in_processes(train_with_nan_on_rank_1, arguments, count=2, log=tmp_path / "log")
    told = ["the VAE gave them for finite latents" in (tmp_path / f"log.{rank}").read_text() for rank in (0, 1)]
    assert sorted(told) == [False, True], "said once"
    assert statuses == [2, 2]
    assert [path.name for path in list_checkpoints(tmp_path / "runs" / "nan")] == ["epoch_000001"]


def train_with_nan_on_rank_1(arguments: list[str]) -> None:
    """The body of a process: the command, with a NaN in an image of the second epoch on the second process."""
    exact, score, epochs = Policy.decode, trainers.epoch.binding.score, []

    def counted(*positional: object, **keywords: object) -> object:
        epochs.append(1)
        return score(*positional, **keywords)

    def decode(self, latents, **options):  # type: ignore[no-untyped-def]
        images = exact(self, latents, **options)
        return images * math.nan if len(epochs) == 2 and os.environ["RANK"] == "1" else images

    trainers.epoch.binding.score = counted
    Policy.decode = decode
    command(arguments)


def test_learning_rate_warms_up_and_decays() -> None:
    assert [rate_factor(u, "constant", 2, 10) for u in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
    assert rate_factor(6, "linear", 2, 10) == pytest.approx(0.5)
    assert rate_factor(6, "cosine", 2, 10) == pytest.approx(0.5)
    assert rate_factor(10, "cosine", 2, 10) == pytest.approx(0.0)


def test_a_reward_that_fails_in_an_evaluation_with_fewer_images_than_processes_stops_all(
    model: Path, tmp_path: Path
) -> None:
    reward = tmp_path / "broken.py"
    reward.write_text("def broken(images, prompts, metadata):\n    raise RuntimeError('out of ink')\n")
    config = write_config(tmp_path, model)
    one_image = ["--evaluation.num_prompts", "1", "--evaluation.images_per_prompt", "1"]
    arguments = ["train", str(config), "--rewards.0.name", f"{reward}:broken", *one_image]
    assert in_processes(command, arguments, count=2, log=tmp_path / "log") == [2, 2]
    told = ["out of ink" in (tmp_path / f"log.{rank}").read_text() for rank in (0, 1)]
    assert sorted(told) == [False, True], "said once"
    fine = ["train", str(config), "--run.name", "fine", "--epochs", "1", *one_image]
    all_succeed(command, fine, count=2, log=tmp_path / "fine.log")
