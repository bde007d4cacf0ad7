"""Small runs of the real trainer on a tiny random pipeline."""

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from trainers.checkpoint import latest_checkpoint
from trainers.report import WALL_CLOCK
from trainers.run import read_metrics

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


def write_config(folder: Path, model: Path, *, guidance: float = 1.0, extra: str = "") -> Path:
    """A configuration of a three-epoch run in `folder`, with its prompts."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a cat\na dog\na bird\na fish\na horse\n")
    config = folder / "tiny.yaml"
    config.write_text(CONFIG.format(model=model, guidance=guidance, prompts=prompts, output=folder / "runs") + extra)
    return config


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


def launch(*arguments: str, num_processes: int = 1) -> subprocess.CompletedProcess:
    """Runs `python -m trainers` in one process or under torchrun."""
    module = ["-m", "trainers", *arguments]
    if num_processes > 1:
        module = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes), *module]
    return subprocess.run(
        [sys.executable, *module], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
