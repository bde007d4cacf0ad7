"""Small runs of the real trainer on a tiny random pipeline."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from trainers.config.io import load_config, to_yaml
from trainers.epoch.report import WALL_CLOCK
from trainers.loop import train_from_config
from trainers.run_folder.checkpoint import latest_checkpoint
from trainers.run_folder.folder import read_metrics

ROOT = Path(__file__).resolve().parent.parent.parent

CONFIG = """\
model: {{path: {model}}}
adapter: {{rank: 2}}
sampler: {{num_steps: 3, guidance_scale: {guidance}}}
objective: {{ratio: joint, updates_per_epoch: 2, step_fraction: 1.0}}
kl: {{kind: adaptive, target: 0.01, alpha: 0.01}}
batch: {{samples_per_epoch: 8, group_size: 2, sample_batch_size: 4, train_batch_size: 5}}
optimizer: {{learning_rate: 1e-3, ema_decay: 0.9, schedule: constant, warmup_updates: 2}}
rewards:
  - {{name: brightness, normalize: std}}
prompts: {{source: {prompts}}}
evaluation: {{num_prompts: 2, images_per_prompt: 2, every_epochs: 2}}
checkpoints: {{every_epochs: 1, keep_last: 10}}
tracking: {{trackers: [], pictures_every_epochs: 2, num_pictures: 4}}
run: {{output_dir: {output}}}
epochs: 3
"""


def write_config(folder: Path, model: Path, *, guidance: float = 1.0, extra: str = "", template: str = CONFIG) -> Path:
    """A configuration of a short run in `folder`, with its prompts; the default has three epochs."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a cat\na dog\na bird\na fish\na horse\n")
    config = folder / "tiny.yaml"
    config.write_text(template.format(model=model, guidance=guidance, prompts=prompts, output=folder / "runs") + extra)
    return config


def start(config: Path, *overrides: str) -> Path:
    """The folder of a run of a configuration file."""
    loaded = load_config(config, overrides)
    return train_from_config(loaded, config_yaml=to_yaml(loaded, full=True))


def reproducible(run: Path) -> list[dict]:
    """The metrics rows without what depends on the clock."""
    return [{key: value for key, value in row.items() if not key.startswith(WALL_CLOCK)} for row in read_metrics(run)]


def weights(run: Path, *groups: str) -> dict:
    """The tensors of the newest checkpoint."""
    folder = latest_checkpoint(run)
    assert folder is not None
    return {
        f"{group}.{name}": value
        for group in groups
        for name, value in load_file(folder / f"{group}.safetensors").items()
    }


def assert_trained_alike(one: dict, two: dict) -> None:
    """Asserts that two runs moved a LoRA's weights by the same, but for rounding: by the norm of the difference.

    Single weights differ by more, since Adam gives a gradient that is zero but for rounding a whole step.
    """
    assert one.keys() == two.keys()
    began_at_zero = [name for name in one if "lora_B" in name]
    moved = float(torch.cat([one[name].flatten() for name in began_at_zero]).norm())
    apart = float(torch.cat([(one[name] - two[name]).flatten() for name in began_at_zero]).norm())
    assert moved > 1e-3
    assert apart < 1e-2 * moved, f"weights differ by {apart:.2e} after a move of {moved:.2e}"


def environment() -> dict[str, str]:
    """For a subprocess that runs this checkout on the CPU."""
    return {
        **os.environ,
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
