"""What can only be said on a GPU, in one command of about eight minutes that downloads nothing.

    python -m benchmarks.gpu_acceptance --out acceptance          an NVIDIA GPU
    python -m benchmarks.gpu_acceptance --out acceptance --tiny   the same parts, small, on the CPU

Each part is a process of its own with a time limit, so that one that fails, hangs or runs out of memory takes no other
with it. After every part `acceptance.json` and `acceptance.md` in the folder are written anew; what a part printed is
in `PART.log` there. A second call with the same folder does what is missing or failed.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.first_ratio import PROMPTS, load
from ddpo import Policy, rollout, sample_seeds
from trainers.parallel.sharding import shard, whole
from trainers.planning.estimate.cards import GIB
from trainers.run_folder.checkpoint import latest_checkpoint

ROOT = Path(__file__).resolve().parent.parent
TARGET_IMAGES, TARGET_STEPS, TARGET_SECONDS = 256, 50, 206.0  # an SD 1.5 epoch at 40% of 790 TFLOP/s
Facts = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all parts share.

    Attributes:
        out: Folder of the results.
        tiny: Small, on the CPU.
    """

    out: Path
    tiny: bool

    @property
    def device(self) -> str:
        """Where it runs."""
        return "cpu" if self.tiny else "cuda"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing to find out.

    Attributes:
        title: In the table.
        seconds: Time limit on a GPU.
        run: Finds it out; raises if it cannot.
    """

    title: str
    seconds: int
    run: Callable[[Settings], Facts]


def matmul(settings: Settings) -> Facts:
    """The rate of the card's fastest large bfloat16 product, which the other parts' shares are of."""
    size, best = (1024 if settings.tiny else 8192), 0.0
    left, right = (torch.randn(size, size, device=settings.device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(20):
        _wait(settings)
        start = time.perf_counter()
        for _ in range(10):
            left @ right
        _wait(settings)
        best = max(best, 10 * 2 * size**3 / (time.perf_counter() - start) / 1e12)
    card = "CPU" if settings.tiny else torch.cuda.get_device_name()
    memory = 0 if settings.tiny else torch.cuda.get_device_properties(0).total_memory
    return {"card": card, "memory GiB": memory / GIB, "peak TFLOP/s": best, "torch": torch.__version__}


def _wait(settings: Settings) -> None:
    if not settings.tiny:
        torch.cuda.synchronize()


def _call(command: list[str], **environment: str) -> str:
    """Runs a command of this project; returns what it printed, which is in the part's log too."""
    process = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, **environment}, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(process.stdout, flush=True)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {_last_line(process.stdout)}")
    return process.stdout


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _epoch(settings: Settings, model: str, *options: str) -> Facts:
    peak = _read(settings).get("matmul", {}).get("facts", {}).get("peak TFLOP/s", 790.0)
    where = ["--tiny"] if settings.tiny else ["--pipeline", str(settings.out / "pipelines" / model), "--model", model]
    printed = _call(["-m", "benchmarks.gpu_epoch", *where, "--tflops", str(peak), *([] if settings.tiny else options)])
    found = json.loads(_last_line(printed))
    seconds, images, planned = found["seconds"], found["images"], max(found["planned_bytes"].values())
    facts: Facts = {
        "images/s": images / seconds["epoch"],
        "sampling images/s": images / seconds["sample"],
        "training images/s": images / seconds["train"],
        "share of the peak": sum(found["flops"].values()) / seconds["epoch"] / 1e12 / peak,
        "epoch s": seconds["epoch"],
        "first epoch s": seconds["first epoch"],
    }
    if found["peak_bytes"]:
        facts |= {"peak GiB": found["peak_bytes"] / GIB, "planned GiB": planned / GIB}
    return facts


def sd15(settings: Settings) -> Facts:
    """SD 1.5's size, 512 pixels, and from it the epoch that is aimed at."""
    images, steps = 32, 20
    facts = _epoch(settings, "sd15", "--images", str(images), "--steps", str(steps))
    if not settings.tiny:
        epoch = float(str(facts["epoch s"])) * TARGET_IMAGES / images * TARGET_STEPS / steps
        facts |= {"256 x 50, in proportion, s": epoch, "target s": TARGET_SECONDS}
    return facts


def sdxl(settings: Settings) -> Facts:
    """SDXL's size, 1024 pixels."""
    return _epoch(settings, "sdxl", "--images", "8", "--steps", "10", "--sample-batch", "4", "--train-batch", "4")


def sd35(settings: Settings) -> Facts:
    """SD 3.5 medium's size, 1024 pixels."""
    return _epoch(settings, "sd35", "--images", "8", "--steps", "10", "--sample-batch", "4", "--train-batch", "2")


def compiled(settings: Settings) -> Facts:
    """SD 1.5's size under torch.compile: the first epoch has the compiling in it."""
    facts = _epoch(settings, "sd15", "--images", "32", "--steps", "20", "--compile")
    eager = _read(settings).get("sd15", {}).get("facts", {})
    if "epoch s" in eager:
        facts["seconds over eager's"] = float(str(facts["epoch s"])) / float(str(eager["epoch s"]))
    return facts


def small_optimizer(settings: Settings) -> Facts:
    """8-bit Adam and a base model in 4 bits."""
    return _epoch(settings, "sd15", "--images", "8", "--steps", "10", "--eight-bit-adam", "--quantization", "bnb_4bit")


def first_ratio(settings: Settings) -> Facts:
    """The largest |log ratio| before any update: 0 is exact."""
    printed = _call(["-m", "benchmarks.first_ratio", "--device", settings.device, *["--only-ratio"] * settings.tiny])
    rows = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in printed.splitlines() if "|" in line]
    columns = rows[0][1:]
    return {
        f"{row[0]}, {column}": float(value)
        for row in rows
        if row[0] in ("same calls", "training in calls of 3 rows")
        for column, value in zip(columns, row[1:], strict=True)
    }


def _train(settings: Settings, name: str) -> list[str]:
    few = [
        "--epochs", "2", "--batch.samples_per_epoch", "32", "--evaluation.num_prompts", "2",
        "--checkpoints.every_epochs", "1", "--tracking.trackers", "[]", "--model.device", "null",
        "--run.output_dir", str(settings.out / "runs"), "--run.name", name,
    ]  # fmt: skip
    return ["-m", "trainers", "train", "shapes_ppo", *few]


def _environment(settings: Settings) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ""} if settings.tiny else {}


def _weights(settings: Settings, name: str) -> torch.Tensor:
    folder = latest_checkpoint(settings.out / "runs" / name)
    assert folder is not None, f"run {name} has no checkpoint"
    tensors = load_file(folder / "weights.safetensors")
    return torch.cat([tensors[key].flatten().double() for key in sorted(tensors)])


def _fresh(settings: Settings, *names: str) -> None:
    """Moves earlier runs of these names away."""
    for name in names:
        folder = settings.out / "runs" / name
        if folder.exists():
            folder.rename(folder.with_name(f"{name}-before-{time.time_ns()}"))


def _apart(one: torch.Tensor, other: torch.Tensor) -> Facts:
    return {"bit-exact": bool(torch.equal(one, other)), "largest difference": float((one - other).abs().max())}


def _group(settings: Settings) -> str:
    """A process group of one, which runs skip; returns its backend."""
    file = settings.out / f"group-{time.time_ns()}"
    backend = "gloo" if settings.tiny else "nccl"
    dist.init_process_group(backend, init_method=file.as_uri(), rank=0, world_size=1)
    return str(dist.get_backend())


def process_group(settings: Settings) -> Facts:
    """The collectives that runs use, on the device, and gloo's on the CPU beside them."""
    backend = _group(settings)
    values = torch.randn(1000, device=settings.device)
    total, sent, received = values.clone(), values.clone(), torch.empty_like(values)
    dist.all_reduce(total)
    dist.broadcast(sent, src=0)
    dist.all_gather_into_tensor(received, values)
    count = torch.ones(1, dtype=torch.int64)
    dist.all_reduce(count, group=dist.new_group(backend="gloo"))
    exact = all(torch.equal(found, values) for found in (total, sent, received)) and int(count) == 1
    return {"backend": backend, "exact": exact}


def split_network(settings: Settings) -> Facts:
    """The network split over a group of one against the whole: log-probabilities, and gradients of their sum."""
    backend = _group(settings)
    policy = load("fp32", device=settings.device)
    before = _log_probs_and_gradients(policy)
    mesh = init_device_mesh(settings.device, (1,))
    for network in policy.networks():
        shard(network, mesh)
    after = _log_probs_and_gradients(policy)
    names = ("log-probabilities", "gradients")
    apart = {
        f"{name}, relative": float((one - other).norm() / one.norm())
        for name, one, other in zip(names, before, after, strict=True)
    }
    return {"backend": backend, **apart}


def _log_probs_and_gradients(policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    path = rollout(policy, policy.encode(PROMPTS), sample_seeds(0, 0, range(len(PROMPTS))))
    steps = path.schedule.stochastic_steps
    sum(policy(k, path.latents[:, k], path.condition).log_prob(path.latents[:, k + 1]).sum() for k in steps).backward()
    weights = policy.trainable().values()
    gradients = torch.cat([whole(weight.grad).flatten() for weight in weights if weight.grad is not None])
    for weight in weights:
        weight.grad = None
    return path.log_probs[:, list(steps)], gradients


def killed(settings: Settings) -> Facts:
    """`kill -9` in the second epoch, then `--resume`: the weights against those of a run that was left alone."""
    _fresh(settings, "whole", "killed")
    _call(_train(settings, "whole"), **_environment(settings))
    command = [sys.executable, *_train(settings, "killed")]
    run = settings.out / "runs" / "killed"
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **_environment(settings)}, start_new_session=True)
    while process.poll() is None and latest_checkpoint(run) is None:
        time.sleep(0.05)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    status = process.wait()
    if status != -signal.SIGKILL:
        raise RuntimeError(f"the run ended with {status} before it could be killed")
    _call(["-m", "trainers", "train", "--resume", str(run)], **_environment(settings))
    return _apart(_weights(settings, "whole"), _weights(settings, "killed"))


PARTS = {
    "matmul": Part(title="bf16 matrix product", seconds=60, run=matmul),
    "sd15": Part(title="epoch, SD 1.5's size", seconds=150, run=sd15),
    "first_ratio": Part(title="first log ratio", seconds=60, run=first_ratio),
    "killed": Part(title="kill -9 and resume", seconds=120, run=killed),
    "process_group": Part(title="process group of one", seconds=60, run=process_group),
    "split_network": Part(title="FSDP2 of one", seconds=60, run=split_network),
    "sdxl": Part(title="epoch, SDXL's size", seconds=150, run=sdxl),
    "sd35": Part(title="epoch, SD 3.5 medium's size", seconds=150, run=sd35),
    "small_optimizer": Part(title="8-bit Adam, 4-bit base", seconds=90, run=small_optimizer),
    "compiled": Part(title="SD 1.5 compiled", seconds=240, run=compiled),
}


def _read(settings: Settings) -> dict[str, dict]:
    file = settings.out / "acceptance.json"
    return json.loads(file.read_text(encoding="utf-8"))["parts"] if file.is_file() else {}


def _write(settings: Settings, parts: dict[str, dict]) -> None:
    machine = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
    text = json.dumps({"machine": machine, "tiny": settings.tiny, "parts": parts}, indent=2)
    (settings.out / "acceptance.json").write_text(text + "\n", encoding="utf-8")
    (settings.out / "acceptance.md").write_text(table(parts), encoding="utf-8")


def table(parts: dict[str, dict]) -> str:
    """Markdown: a row for each part, what failed with its reason."""
    lines = ["| part | seconds | found |", "|---|---|---|"]
    for name, result in parts.items():
        facts = (f"{key} {_text(value)}" for key, value in result.get("facts", {}).items())
        found = "; ".join(facts) if "facts" in result else f"**failed**: {result['error']}"
        lines.append(f"| {PARTS[name].title} | {result['seconds']:.0f} | {found.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _run_part(settings: Settings, name: str) -> dict[str, object]:
    """Runs a part in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu_acceptance", "--out", str(settings.out), "--part", name]
    start, result = time.monotonic(), settings.out / f"{name}.json"
    result.unlink(missing_ok=True)
    with (settings.out / f"{name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command + ["--tiny"] * settings.tiny, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout=PARTS[name].seconds * (5 if settings.tiny else 1))
        except subprocess.TimeoutExpired:
            status = None
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if status is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    seconds = time.monotonic() - start
    if status == 0 and result.is_file():
        return {"seconds": seconds, "facts": json.loads(result.read_text(encoding="utf-8"))}
    last = _last_line((settings.out / f"{name}.log").read_text(encoding="utf-8", errors="replace"))
    return {"seconds": seconds, "error": f"more than {seconds:.0f} s" if status is None else f"{last} ({name}.log)"}


def main() -> int:
    """Runs what is missing; 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="small, on the CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = Settings(out=options.out.resolve(), tiny=options.tiny)
    if not settings.tiny and not torch.cuda.is_available():
        print("this needs a CUDA GPU and there is none here; --tiny runs the same parts on the CPU", file=sys.stderr)
        return 2
    settings.out.mkdir(parents=True, exist_ok=True)
    if options.part:
        facts = PARTS[options.part].run(settings)
        (settings.out / f"{options.part}.json").write_text(json.dumps(facts), encoding="utf-8")
        return 0
    parts = _read(settings)
    for name in options.only:
        if "facts" in parts.get(name, {}):
            continue
        print(f"{PARTS[name].title} ...", flush=True)
        parts[name] = _run_part(settings, name)
        _write(settings, parts)
        print(table({name: parts[name]}).splitlines()[-1], flush=True)
    print(f"\n{table(parts)}\nwritten: {settings.out / 'acceptance.json'} and acceptance.md")
    return int(any("error" in parts[name] for name in options.only))


if __name__ == "__main__":
    sys.exit(main())
