"""Our epoch and that of TRL's `DDPOTrainer` in turn: processor seconds of one thread, and their ratio.

    python -m benchmarks.against_trl
    python -m benchmarks.against_trl --rounds 3 --only small-32 --env ~/.cache/ddpo/trl

The last TRL with DDPO is 0.23.1, which needs older libraries: they are installed into an environment of their own on
first use (`--env`; some 5 GB with torch, of this environment's version). The same random pipelines of Stable
Diffusion's classes, LoRA of rank 4, guidance in both phases, one update an epoch, reward the mean brightness, float32.
What is around an epoch (saving, evaluation, logging) is in neither. The two run one after the other, round after round,
so that what else the machine does falls on both; a ratio is one round's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.gpu_epoch import epochs
from benchmarks.random_pipelines import small_stable_diffusion
from trainers.config.io import load_config

TRL = ("trl==0.23.1", "diffusers==0.35.2", "transformers==4.56.2", "accelerate==1.10.1", "peft==0.17.1")
ROOT = Path(__file__).resolve().parent.parent
TRL_WORKER = ROOT / "benchmarks" / "trl_epochs.py"
CHANNELS = {"small": (16, 32), "middle": (32, 64), "large": (48, 96)}


@dataclass(frozen=True, kw_only=True)
class Work:
    """An epoch's work.

    Attributes:
        images: Sampled and trained on.
        sample_batch: Images per network call in sampling.
        train_batch: Transitions per network call in training.
        steps: Denoising steps.
        guidance: Guidance scale, which doubles a call's rows.
    """

    images: int
    sample_batch: int = 8
    train_batch: int = 8
    steps: int = 20
    guidance: float = 5.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """Two epochs to be compared.

    Attributes:
        network: Key of CHANNELS.
        trl: TRL's work.
        ours: The same images and steps.
    """

    network: str
    trl: Work
    ours: Work


CASES = {
    "small-32": Case(network="small", trl=Work(images=32), ours=Work(images=32)),
    "small-32-full": Case(network="small", trl=Work(images=32), ours=Work(images=32, sample_batch=32, train_batch=64)),
    "small-256": Case(network="small", trl=Work(images=256), ours=Work(images=256, sample_batch=32, train_batch=64)),
    "small-32-defaults": Case(
        network="small", trl=Work(images=32, sample_batch=1, train_batch=1), ours=Work(images=32)
    ),
    "middle-32": Case(network="middle", trl=Work(images=32), ours=Work(images=32)),
    "large-32": Case(network="large", trl=Work(images=32), ours=Work(images=32)),
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=Path.home() / ".cache" / "ddpo" / "trl-0.23.1", help="TRL's own")
    parser.add_argument("--rounds", type=int, default=5, help="timed epochs of each, after one warm-up (default 5)")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--ours", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        answer(Path(options.ours[0]), Work(**json.loads(options.ours[1])))
        return
    python = environment(options.env.expanduser())
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for case in tqdm(options.only, unit="case"):
            rows.append(compare(CASES[case], python, Path(name), rounds=options.rounds))
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print("\n".join([*_HEAD, *rows]))
    print(f"\n{os.cpu_count()} cores, load {load}; median (least to most) of {options.rounds} rounds")


_HEAD = (
    "| network | images | calls: TRL's | ours | TRL, CPU s | ours, CPU s | TRL / ours | in wall time |",
    "|---|---|---|---|---|---|---|---|",
)


def environment(folder: Path) -> Path:
    """The interpreter that has TRL; installs it first if it is not there."""
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.is_file():
        version = torch.__version__.partition("+")[0]
        print(f"installing {', '.join(TRL)} and torch {version} into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *TRL, f"torch=={version}"], check=True)
        done.touch()
    return python


def compare(case: Case, python: Path, folder: Path, *, rounds: int) -> str:
    """Runs both in turn; returns a row of the table."""
    pipeline = folder / case.network
    if not pipeline.is_dir():
        save(pipeline, CHANNELS[case.network])
    theirs = [str(python), str(TRL_WORKER), str(pipeline), json.dumps(asdict(case.trl))]
    ours = [sys.executable, "-m", "benchmarks.against_trl", "--ours", str(pipeline), json.dumps(asdict(case.ours))]
    with worker(theirs) as trl, worker(ours) as own:
        pairs = [(epoch(trl), epoch(own)) for _ in range(rounds + 1)][1:]
    size = parameters(pipeline) / 1e6
    cells = [
        f"{case.network}, {size:.2f} M", str(case.trl.images), *(_calls(work) for work in (case.trl, case.ours)),
        *(_spread([pair[side]["cpu"] for pair in pairs]) for side in (0, 1)),
        *(_spread([one[clock] / other[clock] for one, other in pairs]) for clock in ("cpu", "wall")),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def save(pipeline: Path, channels: tuple[int, int]) -> None:
    """Writes a random pipeline as both generations of transformers read it: the older one's tokenizer has two files."""
    random = small_stable_diffusion(channels)
    random.save_pretrained(pipeline)
    (pipeline / "tokenizer" / "vocab.json").write_text(json.dumps(random.tokenizer.get_vocab()))
    (pipeline / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")


def parameters(pipeline: Path) -> int:
    """Weights of a saved pipeline's U-Net."""
    from diffusers import UNet2DConditionModel

    return int(UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet").num_parameters())


def _calls(work: Work) -> str:
    return f"{work.sample_batch} / {work.train_batch}"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


@contextmanager
def worker(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that answers a line by a line."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def epoch(process: subprocess.Popen[str]) -> dict[str, float]:
    """Seconds of a worker's next epoch; lines that a library prints are passed over."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith('{"cpu"'):
            return dict(json.loads(line))
    raise RuntimeError(f"the worker ended with status {process.wait()}; its last words are above")


def answer(pipeline: Path, work: Work) -> None:
    """Our worker."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        file, prompts = Path(name, "run.yaml"), Path(name, "prompts.txt")
        file.write_text("{}\n")
        prompts.write_text("a cat\na dog\na bird\na horse\n")
        keys = {
            "model.path": pipeline, "model.device": "cpu", "adapter.rank": 4, "rewards.0.name": "brightness",
            "prompts.source": prompts, "sampler.kind": "ddim", "sampler.num_steps": work.steps,
            "sampler.guidance_scale": work.guidance, "objective.updates_per_epoch": 1,
            "batch.samples_per_epoch": work.images, "batch.group_size": 4,
            "batch.sample_batch_size": work.sample_batch, "batch.train_batch_size": work.train_batch,
        }  # fmt: skip
        runs = epochs(load_config(file, [word for key, value in keys.items() for word in (f"--{key}", str(value))]))
        for _ in sys.stdin:
            cpu = time.process_time()
            wall = next(runs)["epoch"]
            print(json.dumps({"cpu": time.process_time() - cpu, "wall": wall}), flush=True)


if __name__ == "__main__":
    main()
