"""Epochs of TRL's `DDPOTrainer`, in an environment that has it: `benchmarks/against_trl.py` makes that and calls this.

    PYTHON benchmarks/trl_epochs.py PIPELINE SETTINGS

PIPELINE is a folder, SETTINGS the JSON of `benchmarks.against_trl.Work`. An epoch is run for each line of standard
input and answered with a JSON line of its processor seconds (`cpu`) and its `wall` seconds.
"""

import itertools
import json
import sys
import time

import torch
from accelerate import PartialState
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

PROMPTS = ("a cat", "a dog", "a bird", "a horse")


def main() -> None:
    """Answers lines until there are none."""
    folder, settings = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    PartialState(cpu=True)  # the trainer logs before it has made one
    config = DDPOConfig(
        mixed_precision="no",
        sample_num_steps=settings["steps"],
        sample_guidance_scale=settings["guidance"],
        sample_batch_size=settings["sample_batch"],
        sample_num_batches_per_epoch=settings["images"] // settings["sample_batch"],
        train_batch_size=settings["train_batch"],
        train_gradient_accumulation_steps=settings["images"] // settings["train_batch"],
        train_cfg=True,
        save_freq=10**9,
    )
    prompts = itertools.cycle(PROMPTS)
    trainer = DDPOTrainer(
        config,
        lambda images, prompts, metadata: (images.mean((1, 2, 3)), {}),
        lambda: (next(prompts), {}),
        DefaultDDPOStableDiffusionPipeline(folder, use_lora=True),
    )
    trainer.sd_pipeline.set_progress_bar_config(disable=True)
    for epoch, _ in enumerate(sys.stdin):
        cpu, wall = time.process_time(), time.perf_counter()
        trainer.step(epoch, epoch)
        print(json.dumps({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}), flush=True)


if __name__ == "__main__":
    main()
