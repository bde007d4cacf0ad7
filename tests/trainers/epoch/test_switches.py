"""The switches of the policy gradient through the whole trainer: what runs, resumes, and is refused beforehand."""

from pathlib import Path

import pytest
import torch

from ddpo import SamplerConfig
from ddpo.objectives.clean_sample import CleanSampleConfig
from rewards import RewardTerm, WeightedSum
from tests.trainers.epoch.test_epoch import collected, small, tiny_policy
from tests.trainers.loop_helpers import reproducible, start, weights
from trainers.config.groups import BatchConfig
from trainers.config.io import ConfigError, load_config
from trainers.loop import resume
from trainers.run_folder.folder import read_metrics

RUN = """\
model: {{path: {model}}}
adapter: {{rank: 2}}
sampler: {{num_steps: 3, guidance_scale: 2.0, stochastic_steps: {{kind: window, size: 2, shift_every_epochs: 1,
  restart: true}}}}
objective: {{ratio: guard, mask: kl, mask_nats: 1.0e-6, step_weight: noise_level, train_guidance: none}}
advantages: {{diversity: diversity/nearest}}
batch: {{samples_per_epoch: 8, group_size: 4, group_noise: antithetic, sample_batch_size: 3, train_batch_size: 5,
  trajectories: cpu}}
optimizer: {{learning_rate: 1e-3}}
rewards: [{{name: brightness}}, {{name: diversity, weight: 0}}]
prompts: {{source: shapes}}
evaluation: {{num_prompts: 1, images_per_prompt: 2, every_epochs: 0, ode: false}}
checkpoints: {{every_epochs: 1, keep_last: 10}}
tracking: {{trackers: [], pictures_every_epochs: 0}}
run: {{output_dir: {output}}}
epochs: 3
"""


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    file = tmp_path / "switches.yaml"
    file.write_text(RUN.format(model=model, output=tmp_path / "runs"))
    return file


def test_all_switches_at_once_train_and_resume_bit_exactly(config: Path) -> None:
    whole = start(config, "--run.name", "whole")
    parts = start(config, "--run.name", "parts", "--epochs", "1")
    resume(parts, ["--epochs", "3"])
    first, second = (weights(run, "weights", "optimizer") for run in (whole, parts))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert str(reproducible(whole)) == str(reproducible(parts)), "as text, in which NaN is NaN"
    rows = read_metrics(whole)
    assert all(row["policy/gate_nats"] < 1e-2 and row["policy/old_kl_nats"] >= 0 for row in rows)
    assert rows[-1]["policy/clip_fraction"] > 0, "the second update finds steps beyond so small a bound"
    trained = [[value is not None and value == value for value in row["per_step/old_kl_nats"]] for row in rows]
    assert trained == [[True, True, False], [False, True, True], [True, True, False]], "the window starts again"


def test_pairs_are_sampled_from_opposite_noises_and_groups_from_one_start() -> None:
    reward = WeightedSum([RewardTerm(name="brightness")])
    for kind in ("antithetic", "shared"):
        batch = BatchConfig(
            samples_per_epoch=8, group_size=4, sample_batch_size=3, train_batch_size=8, group_noise=kind
        )
        epoch, _ = collected(small(batch=batch), tiny_policy(), reward)
        starts = epoch.samples.trajectory.state(0)
        if kind == "antithetic":
            assert torch.equal(starts[1::2], -starts[::2])
        else:
            assert all(torch.equal(starts[row], starts[row - row % 4]) for row in range(8))
        assert len({tuple(x.flatten().tolist()) for x in epoch.samples.trajectory.final}) == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--batch.group_size", "2"), "batch.group_size: must be at least 4 with batch.group_noise: antithetic"),
        (("--batch.group_size", "1"), "batch.group_size: must be even with group_noise: antithetic"),
        (("--advantages.baseline", "prompt"), "advantages.baseline: must be group or batch with batch.group_noise"),
        (("--advantages.diversity", "aesthetic"), "advantages.diversity: must be null, a reward of"),
        (("--objective.clip_range", "0.1"), "objective.clip_range: must be null with mask: kl"),
        (("--sampler.stochastic_steps.shift_every_epochs", "0"), "restart: must be null but for a window that moves"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_load(config: Path, overrides, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=message):
        load_config(config, overrides)


def test_one_start_for_all_needs_noise_to_tell_samples_apart() -> None:
    with pytest.raises(ValueError, match=r"batch.group_noise must be independent or antithetic"):
        small(
            sampler=SamplerConfig(kind="ode", num_steps=4),
            objective=CleanSampleConfig(),
            batch=BatchConfig(group_noise="shared"),
        )
