"""An epoch of the real trainer on every family of pipelines: rollout with KL, reward, update, evaluation, export."""

from pathlib import Path

import pytest

from ddpo import LoraConfig
from ddpo.credit.kl import FixedKL
from ddpo.objectives import PolicyGradientConfig
from tests.ddpo.test_families import FAMILIES, PROMPTS, make, metadata
from trainers.config import Config
from trainers.config.groups import BatchConfig, EvaluationConfig, OptimizerConfig, RunConfig, TrackingConfig
from trainers.loop import train
from trainers.prompts import Prompt
from trainers.run_folder.folder import read_metrics


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("family", [name for name in FAMILIES if " " not in name])
def test_an_epoch_of_training_starts_at_ratio_one_and_exports_an_adapter(family: str, tmp_path: Path) -> None:
    config = Config(
        adapter=LoraConfig(rank=2),
        objective=PolicyGradientConfig(ratio="joint", updates_per_epoch=1),
        kl=FixedKL(alpha=0.01),
        batch=BatchConfig(samples_per_epoch=4, group_size=2, sample_batch_size=4, train_batch_size=3),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(num_prompts=1, images_per_prompt=2, ode=False),
        tracking=TrackingConfig(trackers=()),
        run=RunConfig(output_dir=str(tmp_path)),
        epochs=2,
    )
    policy = make(family)
    prompts = [Prompt(text=text, metadata=extra) for text, extra in zip(PROMPTS, metadata(policy), strict=True)]
    run = train(policy, reward=brightness, prompts=prompts, config=config)
    first, second = read_metrics(run)
    assert first["policy/gate_nats"] < 1e-3 and first["optimizer/grad_norm"] > 0
    assert second["kl/path_nats"] > 0
    assert list((run / "lora").rglob("*.safetensors"))
