"""`noise_free_steps: pathwise` in the real trainer: what it runs, what a plan counts, and what is refused."""

import dataclasses
import json
import math

import pytest

from ddpo.validation import UserError
from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import start, write_config
from trainers.config.io import ConfigError, load_config
from trainers.planning.plan import expected_plan
from trainers.planning.preflight import preflight
from trainers.run_folder.folder import read_metrics

CONFIG = """\
model: {{path: {model}}}
adapter: {{rank: 2}}
sampler: {{num_steps: 4, guidance_scale: {guidance}}}
objective: {{surrogate: reinforce, updates_per_epoch: 1, noise_free_steps: pathwise}}
batch: {{samples_per_epoch: 4, group_size: 2, sample_batch_size: 4, train_batch_size: 3}}
optimizer: {{learning_rate: 1e-3}}
rewards: [{{name: brightness, normalize: std}}]
prompts: {{source: {prompts}}}
evaluation: {{num_prompts: 1, images_per_prompt: 2, every_epochs: 0, ode: false}}
tracking: {{trackers: [], pictures_every_epochs: 0}}
run: {{output_dir: {output}}}
epochs: 1
"""


@pytest.fixture(scope="module")
def ends_clean(tmp_path_factory):
    """A pipeline whose last DDIM step has no noise."""
    folder = tmp_path_factory.mktemp("model") / "tiny-sd"
    tiny_stable_diffusion(set_alpha_to_one=True).save_pretrained(folder, safe_serialization=True)
    return folder


def loaded(tmp_path, model, *overrides):
    return load_config(write_config(tmp_path, model, template=CONFIG), overrides)


def test_a_run_takes_chains_again_as_they_were_sampled(ends_clean, tmp_path):
    """Of four steps the first two have noise, the KL has a weight, and the last two are seen by chains alone."""
    window = ("--kl.alpha", "0.1", "--sampler.stochastic_steps.kind", "window", "--sampler.stochastic_steps.size", "2")
    file = write_config(tmp_path, ends_clean, template=CONFIG)
    ignored = ("--run.name", "ignored", "--objective.noise_free_steps", "ignored")
    whole, seen = (read_metrics(start(file, *window, *own))[-1] for own in (("--run.name", "whole"), ignored))
    assert whole["reward/mean"] == seen["reward/mean"], "sampling is the same"
    assert whole["optimizer/grad_norm"] != seen["optimizer/grad_norm"]
    drift = whole["per_step/gate_nats"]
    assert seen["per_step/gate_nats"][2:] == [None, None] and 0 <= drift[2] < 1e-4 and drift[3] is None
    assert whole["per_step/log_ratio_nats"][2:] == [None, None], "a chain has no likelihood"
    entropies, unit = whole["per_step/entropy_nats"], 4 * 16 * 16 * 0.5 * math.log(2 * math.pi * math.e)
    assert entropies[2:] == [None, None] and whole["chain/entropy_nats"] == pytest.approx(unit + sum(entropies[:2]))


def test_an_evaluation_says_how_far_the_last_step_has_moved(ends_clean, tmp_path):
    run = start(write_config(tmp_path, ends_clean, template=CONFIG), "--optimizer.learning_rate", "0.1")
    moved = json.loads((run / "summary.json").read_text())["displacement without noise"]
    assert moved["before"]["mean"] == 0 < moved["after"]["mean"]


def test_a_plan_counts_the_chains(ends_clean, tmp_path):
    def rows(*overrides):
        plan = expected_plan(loaded(tmp_path, ends_clean, *overrides), num_processes=1)
        return plan.units_per_sample, plan.training_rows, plan.rows_known

    ignored = ("--objective.noise_free_steps", "ignored")
    noisy_end = ("--sampler.stochastic_steps.high_noise_fraction", "0.75")
    assert rows(*noisy_end, *ignored) == (3, 4 * 3, False), "flat groups take fewer"
    assert rows(*noisy_end, *ignored, "--kl.alpha", "0.1") == (3, 4 * 3, True)
    assert rows(*noisy_end) == (4, 4 * (3 + 1), False), "three steps and a chain of one"
    window = ("--sampler.stochastic_steps.kind", "window", "--sampler.stochastic_steps.size", "2")
    assert rows(*window) == (3, 4 * (2 + 4), False), "a window that moves leaves the first step to the chain"
    still = (*window, "--sampler.stochastic_steps.shift_every_epochs", "0")
    assert rows(*still) == (3, 4 * (2 + 2), False), "one that stays at the start, two steps"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--advantages.scale=group_std", "advantages.scale: must be batch_std or none with objective.noise_free_steps"),
        ("--advantages.combination=gdpo", "advantages.combination: must be sum with objective.noise_free_steps"),
        ("--advantages.diversity=brightness", "advantages.diversity: must be null with objective.noise_free_steps"),
        ("--sampler.last_step=noisy", "sampler.last_step: must be stock with objective.noise_free_steps"),
        ("--sampler.last_step=pretrained", "sampler.last_step: must be stock with objective.noise_free_steps"),
        ("--distributed.strategy=fsdp", "distributed.strategy: must be ddp with the objective reinforce"),
        ("--objective.train_guidance=none", "objective.noise_free_steps: must be ignored with another step_weight"),
        ("--constraints=[{reward: brightness, at_least: 0.1}]", r"constraints: must be \[\] but for kl with objective"),
    ],
)
def test_what_changes_the_unit_or_hides_no_step_is_refused(ends_clean, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, ends_clean, override)


def test_every_reward_needs_a_derivative(ends_clean, tmp_path):
    config = loaded(tmp_path, ends_clean, "--rewards.1.name=jpeg_compressibility")
    with pytest.raises(ConfigError, match="rewards: jpeg_compressibility must be differentiable with objective.noise_"):
        preflight(config, num_processes=1)
    unweighted = dataclasses.replace(config.rewards[1], weight=0.0)
    preflight(dataclasses.replace(config, rewards=(config.rewards[0], unweighted)), num_processes=1)


def test_a_chain_with_noise_in_every_step_has_nothing_to_add(model, tmp_path):
    with pytest.raises(
        UserError, match=r"noise_free_steps: pathwise has nothing to add here: .*all 4 steps have noise"
    ):
        start(write_config(tmp_path, model, template=CONFIG))
