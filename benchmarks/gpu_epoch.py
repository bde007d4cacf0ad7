"""One epoch on a GPU: images per second by phase, peak memory against the plan, share of the card's peak.

The pipeline has the size of a published one (`--model`) and random weights, so that nothing is downloaded; the reward
is the mean brightness. LoRA, guidance in both phases.

    python -m benchmarks.gpu_epoch                          SD 1.5, 512 px, bf16, 64 images x 50 steps
    python -m benchmarks.gpu_epoch --images 256 --gradient-checkpointing
    python -m benchmarks.gpu_epoch --model sdxl --images 16 --steps 20 --sample-batch 4 --train-batch 2
    python -m benchmarks.gpu_epoch --tiny                   a small pipeline on the CPU: shows that it runs
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.random_pipelines import BUILDERS, save_random_pipeline
from rewards import WeightedSum
from trainers.config import Config
from trainers.config.io import load_config
from trainers.epoch.binding import online, updater
from trainers.epoch.state import TrainState
from trainers.parallel.processes import Processes
from trainers.planning.estimate.blueprint import read_blueprint
from trainers.planning.estimate.cards import GIB
from trainers.planning.estimate.memory import Estimate, estimate
from trainers.planning.plan import expected_plan, make_plan
from trainers.planning.policy_loading import load_policy
from trainers.prompts import PromptStream, load_prompts
from trainers.scoring.scorer import scoring_threads
from trainers.tracking.metrics import Stopwatch
from trainers.tracking.progress import Progress

SAMPLERS = {"sd15": "ddim", "sdxl": "ddim", "sd35": "flow_sde"}


def configure(options: argparse.Namespace, pipeline: Path, folder: Path) -> Config:
    """The run that is measured, of the pipeline in one folder; its own files go to the other."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a cat\na dog\na bird\na horse\n")
    tiny = ["--model.path", "shapes", "--model.device", "cpu", "--model.precision", "fp32"]
    full = ["--model.path", str(pipeline), "--model.precision", "bf16"]
    keys = {
        "model.gradient_checkpointing": str(options.gradient_checkpointing).lower(),
        "model.compile": str(options.compile).lower(),
        "optimizer.eight_bit": str(options.eight_bit_adam).lower(),
        "batch.trajectories": options.trajectories,
        "batch.samples_per_epoch": str(options.images),
        "batch.group_size": "4",
        "batch.sample_batch_size": str(options.sample_batch),
        "batch.train_batch_size": str(options.train_batch),
        "sampler.num_steps": str(options.steps),
        "model.quantization": options.quantization,
        "sampler.kind": SAMPLERS[options.model],
        "gate_tolerance": "1",
        "rewards.0.name": "brightness",
        "prompts.source": str(prompts),
    }
    file = folder / "run.yaml"
    file.write_text("{}\n")
    overrides = [word for name, value in keys.items() for word in (f"--{name}", value)]
    return load_config(file, [*(tiny if options.tiny else full), *overrides])


def epochs(config: Config) -> Iterator[dict[str, float]]:
    """Runs epochs without end; yields each one's seconds by phase, with the whole as `epoch`."""
    processes, progress = Processes(device=config.model.device), Progress(enabled=False)
    policy = load_policy(config, str(processes.device))
    num_stochastic = len(policy.schedule.stochastic_steps)
    plan = make_plan(config, num_processes=1, num_stochastic=num_stochastic, branches=policy.rule.branches)
    reward = WeightedSum(config.rewards, device=policy.device)
    state = TrainState.start(config, policy, reward, PromptStream(load_prompts(config.prompts), seed=0, shuffle=True))
    update = updater(state, plan, processes=processes, progress=progress)
    with scoring_threads(1) as threads:
        source = online(state, plan, threads=threads, processes=processes, progress=progress)
        while True:
            clock, started = Stopwatch(policy.device), time.perf_counter()
            collected = source(state.epoch, clock)
            with clock("train"):
                update(collected.experience, epoch=state.epoch)
            state.counts.epoch += 1
            yield {**clock.seconds, "epoch": time.perf_counter() - started}


def measure(config: Config, rounds: int) -> tuple[dict[str, float], int, str]:
    """Seconds of each phase of the fastest epoch after a warm-up, peak bytes of tensors, and the device's name.

    `first epoch` is the warm-up's own time, with what is compiled in it.
    """
    cuda = torch.cuda.is_available() and config.model.device != "cpu"
    first, *others = islice(epochs(config), rounds + 1)
    best = min(others, key=lambda seconds: seconds["epoch"])
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return {**best, "first epoch": first["epoch"]}, peak, torch.cuda.get_device_name() if cuda else "CPU"


def report(config: Config, planned: Estimate, seconds: dict[str, float], peak: int, device: str, tflops: float) -> None:
    """Prints what was measured beside what was planned, as text and one JSON line."""
    images = planned.plan.images_per_epoch
    total = sum(planned.flops.values())
    share = {"sample": "sampling", "decode": "decoding", "train": "training", "epoch": ""}
    print(f"{device}: {images} images of {planned.plan.num_steps} steps, {config.model.precision}")
    for phase, taken in seconds.items():
        flops = planned.flops.get(share.get(phase, "-"), total if phase == "epoch" else 0)
        rate = (
            f"  {flops / taken / 1e12:7.2f} TFLOP/s, {flops / taken / 1e12 / tflops:.1%} of {tflops:g}" if flops else ""
        )
        print(f"  {phase:<12}{taken:9.2f} s  {images / taken:8.3f} images/s{rate}")
    if peak:
        print(f"  peak {peak / GIB:.2f} GiB, planned {planned.peak / GIB:.2f} GiB: {planned.peak / peak - 1:+.1%}")
    else:
        print(f"  planned peak {planned.peak / GIB:.3f} GiB (measured on GPUs only)")
    print(json.dumps({"device": device, "seconds": seconds, "peak_bytes": peak, "planned_bytes": planned.phases,
                      "flops": planned.flops, "images": images}))  # fmt: skip


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small pipeline on the CPU")
    parser.add_argument("--model", choices=sorted(BUILDERS), default="sd15", help="whose size (default sd15)")
    parser.add_argument("--pipeline", type=Path, help="folder of a pipeline of that size; made there if it is empty")
    parser.add_argument("--images", type=int, help="per epoch (default 64; tiny 8)")
    parser.add_argument("--steps", type=int, help="denoising steps (default 50; tiny 3)")
    parser.add_argument("--sample-batch", type=int, default=16)
    parser.add_argument("--train-batch", type=int, default=8)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--eight-bit-adam", action="store_true")
    parser.add_argument("--quantization", default="null", help="model.quantization (default null)")
    parser.add_argument("--trajectories", choices=("device", "cpu"), default="device")
    parser.add_argument("--rounds", type=int, default=1, help="epochs timed, after one warm-up (default 1)")
    parser.add_argument("--tflops", type=float, default=790.0, help="what the card is held to (default 790)")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        print("this measures a CUDA GPU and there is none here; --tiny runs the same on the CPU", file=sys.stderr)
        return 2
    options.images = options.images or (8 if options.tiny else 64)
    options.steps = options.steps or (3 if options.tiny else 50)
    with TemporaryDirectory() as name:
        folder = Path(name)
        pipeline = options.pipeline or folder / "pipeline"
        if not options.tiny and not (pipeline / "model_index.json").is_file():
            save_random_pipeline(options.model, pipeline)
        config = configure(options, pipeline, folder)
        planned = estimate(config, read_blueprint(config.model.path), expected_plan(config, num_processes=1))
        seconds, peak, device = measure(config, options.rounds)
    report(config, planned, seconds, peak, device, options.tflops)
    return 0


if __name__ == "__main__":
    sys.exit(main())
