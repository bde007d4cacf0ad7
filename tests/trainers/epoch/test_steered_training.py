"""Learning from steered samples: they score higher, cost what the plan says, and what does not fit is refused."""

from pathlib import Path

import pytest
import torch

from tests.trainers.loop_helpers import reproducible, start, weights, write_config
from trainers.config.goal import describe_goal
from trainers.config.io import ConfigError, load_config
from trainers.loop import resume
from trainers.planning.plan import make_plan
from trainers.run_folder.folder import read_metrics

TEMPLATE = """\
model: {{path: {model}}}
adapter: {{rank: 2}}
sampler: {{num_steps: 3, guidance_scale: {guidance}, height: 16, width: 16}}
objective: {{kind: clean_sample, preset: rwr, temperature: 5.0, noises: 2}}
batch: {{samples_per_epoch: 4, group_size: 2, sample_batch_size: 6, train_batch_size: 8}}
optimizer: {{learning_rate: 1e-3}}
rewards: [{{name: redness}}]
prompts: {{source: {prompts}}}
evaluation: {{num_prompts: 1, every_epochs: 0}}
checkpoints: {{every_epochs: 1, keep_last: 10}}
tracking: {{trackers: []}}
run: {{output_dir: {output}}}
epochs: 2
"""


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path, model, template=TEMPLATE)


def test_steered_samples_score_higher_and_a_resume_is_bit_exact(config: Path) -> None:
    keys = ["--steer.kind", "feynman_kac", "--steer.alpha", "0.001", "--steer.every", "1", "--steer.particles", "3"]
    plain = start(config, "--run.name", "plain", "--epochs", "1")
    whole = start(config, "--run.name", "whole", *keys)
    parts = start(config, "--run.name", "parts", "--epochs", "1", *keys)
    resume(parts, ["--epochs", "2"])
    assert read_metrics(whole)[0]["reward/mean"] > read_metrics(plain)[0]["reward/mean"]
    first, second = weights(whole, "weights"), weights(parts, "weights")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert reproducible(whole) == reproducible(parts)
    assert max(float(value.abs().max()) for name, value in first.items() if "lora_B" in name) > 1e-4
    assert "kl/path_nats" in read_metrics(plain)[0] and "kl/path_nats" not in read_metrics(whole)[0]


def test_the_plan_counts_the_particles_rows(config: Path) -> None:
    loaded = load_config(config, ["--steer.kind", "best_of_n", "--steer.particles", "3"])
    plan = make_plan(loaded, num_processes=1, num_stochastic=3)
    assert plan.sampling_rows == 3 * 4 * 3 and plan.reference_rows == 0
    assert "denoiser rows up to 44 per epoch = 36 sampling" in plan.describe()
    assert "steered       by best_of_n, towards the rewards" in describe_goal(loaded)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--objective.kind", "policy_gradient"), "steer.kind: must be null with ppo"),
        (("--objective.kind", "reward_gradient"), "steer.kind: must be null with"),
        (("--sampler.kind", "ode"), "steer.kind: must be best_of_n with a sampler without noise"),
        (("--batch.group_noise", "shared"), "steer.kind: must be null where the samples of a group have shared noise"),
        (("--steer.particles", "7"), "steer.particles: must be at most batch.sample_batch_size, 6"),
        (("--steer.threshold", "0"), r"steer.threshold: must be in \(0, 1\]"),
        (("--steer.candidates", "2"), "steer.candidates: unknown key"),
    ],
)
def test_what_cannot_be_steered_is_refused_before_weights_load(
    config: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config, ["--steer.kind", "feynman_kac", *overrides])
