"""Run folders written for tests of what looks at them: metrics and evaluations without any training."""

import zlib
from pathlib import Path

import torch

from trainers.evaluation.evaluator import Evaluation
from trainers.evaluation.overoptimisation import save_record
from trainers.run_folder.folder import RunFolder

CONFIG = """\
rewards: [{{name: brightness}}]
prompts: {{source: {prompts}}}
batch: {{samples_per_epoch: 16}}
evaluation: {{num_prompts: {count}, images_per_prompt: 2}}
run: {{name: {name}, output_dir: {folder}}}
epochs: {epochs}
"""


def write_run(
    folder: Path,
    name: str = "run",
    *,
    prompts: tuple[str, ...] = ("a cat", "a dog", "a bird"),
    epochs: int = 6,
    every: int = 3,
    gain: float = 0.1,
    extra: str = "",
    **metrics: object,
) -> Path:
    """A run whose reward rises by `gain` an epoch, and whose evaluation images at epoch e have the grey 20 e.

    Args:
        folder: Of runs.
        name: Of the run.
        prompts: Of its evaluation, two images each.
        epochs: Finished ones.
        every: Epochs between evaluations; 0 for none.
        gain: Of the reward.
        extra: More lines of its configuration.
        metrics: More numbers of every epoch, `__` for `/`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"prompts_{zlib.crc32(repr(prompts).encode())}.txt"  # the same for the same prompts
    source.write_text("".join(f"{prompt}\n" for prompt in prompts))
    text = CONFIG.format(prompts=source, count=len(prompts), name=name, folder=folder, epochs=max(1, epochs))
    run = RunFolder.create(folder, name, text + extra)
    for epoch in range(1, epochs + 1):
        run.append_metrics(
            {
                "epoch": epoch, "samples": 16 * epoch, "updates": epoch, "reward/mean": gain * epoch, "reward/std": 1.0,
                "kl/path_nats": 0.5 * epoch, "per_step/kl_nats": [0.1 * epoch, 0.0, 0.4 * epoch],
                "seconds/sample": 3.0, "seconds/train": 1.0, "time/total_seconds": 60.0 * epoch,
                "images_per_second": 4.0, "memory_gib": 1.5, **{k.replace("__", "/"): v for k, v in metrics.items()},
            }
        )  # fmt: skip
    for epoch in range(0, epochs + 1, every) if every else ():
        _evaluate(run, epoch, prompts, gain)
    return run.path


def _evaluate(run: RunFolder, epoch: int, prompts: tuple[str, ...], gain: float) -> None:
    texts = tuple(prompt for prompt in prompts for _ in range(2))
    place = torch.arange(len(texts), dtype=torch.float32)
    values = {"reward": place + gain * epoch * (1 + place), "kl (nats)": torch.full((len(texts),), 0.5 * epoch)}
    grey = torch.full((len(texts), 3, 32, 32), 20 * epoch, dtype=torch.uint8)
    evaluation = Evaluation(values=values, images=grey, prompts=texts)
    evaluation.save(run.evaluation(epoch))
    save_record(run, epoch, evaluation.summary(), [])
