"""What is looked at first in the dashboard and in curves.png, and what log files show of a long epoch."""

import re
import statistics

import pytest
import torch

from ddpo import LoraConfig, Policy, SamplerConfig
from tests.tiny import tiny_stable_diffusion
from trainers.config import Config
from trainers.config.groups import BatchConfig, EvaluationConfig, RunConfig, TrackingConfig
from trainers.loop import train
from trainers.run_folder.folder import read_metrics
from trainers.tracking import progress
from trainers.tracking.first_look import ORDER, drawn, metric_key
from trainers.tracking.progress import Progress


def test_reward_evaluation_heldout_kl_diversity_and_clipping_are_drawn_first():
    known = [
        "epoch", "optimizer/grad_norm", "policy/clip_fraction", "kl/path_nats", "kl/path_nats_se", "eval/heldout/b",
        "eval/heldout/a_se", "reward/mean", "eval/diversity", "eval/heldout/a", "eval/reward", "per_step/kl_nats",
    ]  # fmt: skip
    assert drawn(known) == [
        "reward/mean", "eval/reward", "eval/heldout/b", "eval/heldout/a", "kl/path_nats", "eval/diversity",
        "policy/clip_fraction", "optimizer/grad_norm",
    ]  # fmt: skip
    assert ORDER[-1] == "per_step/*"


@pytest.mark.parametrize(
    ("name", "key"),
    [("kl (nats)", "kl_nats"), ("kl, full noise (nats)", "kl_full_noise_nats"), ("ode/a.b-c", "ode/a.b-c")],
)
def test_keys_of_trackers_have_no_blanks(name, key):
    assert metric_key(name) == key
    assert not re.search(r"\s", metric_key(name))


def test_a_log_file_tells_now_and_then_how_far_an_epoch_is(monkeypatch, capsys):
    now = iter(range(0, 10_000, 25))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    items = list(range(8))
    assert list(Progress(enabled=True).track(items, "sampling")) == items
    told = re.findall(r"sampling: (\d+) of 8 done", capsys.readouterr().err)
    assert 1 <= len(told) < 8
    assert list(Progress(enabled=False).track(items, "sampling")) == items
    assert "sampling" not in capsys.readouterr().err


def test_a_log_file_tells_now_and_then_how_far_something_counted_is(monkeypatch, capsys):
    now = iter(range(0, 10_000, 25))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    for enabled in (True, False):
        with Progress(enabled=enabled).counting(40, "svdd") as advance:
            for _ in range(8):
                advance(5)
        told = re.findall(r"svdd: (\d+) of 40 done", capsys.readouterr().err)
        assert len(told) in (range(1, 8) if enabled else (0,))
        assert all(int(done) % 5 == 0 for done in told)


def test_the_bar_over_epochs_says_what_is_left_of_a_time_limit():
    bar = Progress(enabled=True).epochs(0, 10, timed=True)
    Progress(enabled=True).note_time(bar, 1.25, 3.0, epochs=2)
    assert bar.postfix == "1.25 of 3 min, 1.8 left"
    Progress(enabled=True).note_time(bar, 1.25, 3.0, epochs=8)
    assert bar.postfix == "1.25 of 3 min, 0.31 left", "two more epochs end before the limit"
    bar.close()


def test_the_error_of_the_mean_reward_is_that_of_its_prompts_means(tmp_path):
    scored = {}

    def level(images, prompts, metadata):
        values = images.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])
        if len(prompts) == 6:  # an evaluation has fewer
            for prompt, value in zip(prompts, values.tolist(), strict=True):
                scored.setdefault(prompt, []).append(value)
        return values

    policy = Policy(
        tiny_stable_diffusion(), sampler=SamplerConfig(num_steps=2, guidance_scale=1.0), adapter=LoraConfig(rank=2)
    )
    config = Config(
        batch=BatchConfig(samples_per_epoch=6, group_size=2, sample_batch_size=6, train_batch_size=6),
        evaluation=EvaluationConfig(num_prompts=1, images_per_prompt=1, ode=False),
        tracking=TrackingConfig(trackers=(), pictures_every_epochs=0),
        run=RunConfig(output_dir=str(tmp_path)),
        epochs=1,
    )
    run = train(policy, reward=level, prompts=["a", "bb", "cccc"], config=config)
    (row,) = read_metrics(run)
    assert [len(values) for values in scored.values()] == [2, 2, 2]
    means = [statistics.fmean(values) for values in scored.values()]
    assert row["reward/mean_se"] == pytest.approx(statistics.stdev(means) / 3**0.5, rel=1e-5)
