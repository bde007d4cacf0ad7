"""Evaluations of a run are scored on one scale, that of the first, whatever training has seen since."""

from pathlib import Path

import pytest
import torch

from rewards import Reward, RewardTerm, WeightedSum
from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import write_config
from trainers.config.io import load_config, to_yaml
from trainers.evaluation.evaluator import Evaluation
from trainers.evaluation.overoptimisation import first_scales, read_values
from trainers.loop import train_from_config
from trainers.run_folder.folder import RunFolder


@pytest.mark.parametrize("kind", ["std", "zscore", "prompt_zscore"])
def test_where_every_raw_reward_rose_the_total_rose(tmp_path: Path, kind: str) -> None:
    """Training has meanwhile seen scores of other spreads."""
    generator = torch.Generator().manual_seed(0)
    terms = [RewardTerm(name="a", normalize=kind), RewardTerm(name="b", normalize=kind, weight=0.5)]
    reward = WeightedSum(
        terms, rewards=[Reward(name=name, function=lambda x, p, m: x.mean((1, 2, 3))) for name in "ab"]
    )
    prompts = ("x",) * 32 + ("y",) * 32
    means, run = [], RunFolder.create(tmp_path, "run", "{}")
    for epoch in range(4):
        values = {name: torch.randn(64, generator=generator) * 0.1 + 0.2 * epoch - 16 for name in "ab"}
        raw = Evaluation(values={**values, "reward": torch.zeros(64)}, images=torch.zeros(64, 3, 1, 1), prompts=prompts)
        raw.save(run.evaluation(epoch))
        scored = raw.rescored(first_scales(run, reward, prompts), epoch=epoch)
        means.append(float(scored.values["reward"].mean()))
        training = {name: torch.randn(64, generator=generator) * 0.01 * 3**epoch - 16 for name in "ab"}
        reward.update(training, prompts)
    assert means == sorted(means) and means[-1] > means[0] + 3


def test_a_run_scores_all_its_evaluations_by_the_spread_of_the_first(tmp_path: Path) -> None:
    tiny_stable_diffusion().save_pretrained(tmp_path / "model", safe_serialization=True)
    config = load_config(write_config(tmp_path, tmp_path / "model"), ["--evaluation.every_epochs", "1"])
    run = train_from_config(config, config_yaml=to_yaml(config, full=True))
    folder = RunFolder.open(run)
    values = [read_values(folder.evaluation(epoch)) for epoch in folder.evaluated_epochs()]
    scale = float(values[0]["brightness"].double().std(correction=0))
    assert len(values) == 4
    for entry in values:
        for prefix in ("", "ode/"):
            expected = entry[f"{prefix}brightness"].double() / scale
            torch.testing.assert_close(entry[f"{prefix}reward"].double(), expected, rtol=1e-5, atol=1e-6)
