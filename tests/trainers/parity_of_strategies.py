"""One process against two, in every way to share the network: `python -m tests.trainers.parity_of_strategies`.

Two epochs of a tiny run, with guidance, a KL weight, averages and clipped gradients, on a number of images that does
not divide; the weights, the averages and what was logged are compared with those of one process.
"""

import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import reproducible, weights, write_config
from tests.trainers.world import all_succeed, command

LOGGED = ("reward/mean", "kl/path_nats", "optimizer/grad_norm", "policy/clip_fraction", "kl/alpha")
# 3 prompts x 3 images: 4 of them on one process, 5 on the other, and a prompt's images on both.
SETTINGS = (
    "--epochs", "2", "--batch.samples_per_epoch", "9", "--batch.group_size", "3", "--sampler.guidance_scale", "3",
    "--optimizer.learning_rate", "1e-4", "--evaluation.num_prompts", "1", "--evaluation.images_per_prompt", "3",
    "--evaluation.every_epochs", "0", "--evaluation.ode", "false", "--tracking.pictures_every_epochs", "0",
)  # fmt: skip
STRATEGIES = ("ddp", "fsdp", "zero2")
ONE_UPDATE = ("--objective.updates_per_epoch", "1")
CASES = (  # what is trained, in which precision, how shared, and more settings with their name
    *((adapter, "fp32", strategy, (), "") for adapter in ("lora", "full") for strategy in STRATEGIES),
    *((adapter, precision, "ddp", (), "") for adapter in ("lora", "full") for precision in ("bf16", "fp16")),
    *(("lora", precision, "ddp", ONE_UPDATE, ", one update an epoch") for precision in ("fp32", "bf16", "fp16")),
)


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far a run is from that of one process.

    Attributes:
        grad_norm: Largest relative difference of a logged gradient norm.
        logged: Largest relative difference of any logged number of `LOGGED`.
        weights: Norm of the difference of all weights, relative to the norm of their change in training. Single weights
            differ more: Adam gives a gradient that is zero but for rounding a whole step.
        ema: The same of the averaged weights.
    """

    grad_norm: float
    logged: float
    weights: float
    ema: float


def prepare(folder: Path) -> Path:
    """A tiny model and a configuration in `folder`."""
    tiny_stable_diffusion().save_pretrained(folder / "model", safe_serialization=True)
    return write_config(folder, folder / "model")


def run(config: Path, name: str, *options: str, count: int = 1) -> Path:
    """Trains; returns the run folder."""
    folder = config.parent / "runs" / name
    arguments = ["train", str(config), "--run.name", name, *SETTINGS, *options]
    all_succeed(command, arguments, count=count, log=config.parent / f"{name}.log")
    return folder


def adapter_options(adapter: str) -> tuple[str, ...]:
    """Overrides that choose the adapter."""
    return ("--adapter.kind", "full") if adapter == "full" else ()


def compare(one: Path, other: Path, start: dict[str, torch.Tensor]) -> Parity:
    """The numbers of two runs; `start` holds the weights before training, by the checkpoint's names."""
    first, second = weights(one, "weights"), weights(other, "weights")
    assert first.keys() == second.keys()
    moved = _norm({name: value - start[name] for name, value in first.items()})
    averages = weights(one, "ema"), weights(other, "ema")
    rows = list(zip(reproducible(one), reproducible(other), strict=True))
    return Parity(
        grad_norm=max(_relative(a["optimizer/grad_norm"], b["optimizer/grad_norm"]) for a, b in rows),
        logged=max(_relative(a[key], b[key]) for a, b in rows for key in LOGGED),
        weights=_norm({name: first[name] - second[name] for name in first}) / moved,
        ema=_norm({name: averages[0][name] - averages[1][name] for name in averages[0]}) / moved,
    )


def initial(config: Path, adapter: str, *options: str) -> dict[str, torch.Tensor]:
    """The weights before training, as in a checkpoint."""
    from trainers.config.io import load_config
    from trainers.planning.policy_loading import load_policy

    loaded = load_config(config, [*adapter_options(adapter), *options])
    return {f"weights.{name}": value.detach() for name, value in load_policy(loaded, "cpu").trainable().items()}


def _norm(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors.values()))


def _relative(a: float, b: float) -> float:
    scale = max(abs(a), abs(b))
    return 0.0 if scale < 1e-6 or math.isclose(a, b, abs_tol=1e-9) else abs(a - b) / scale


def table(rows: Sequence[tuple[str, str, str, Parity]]) -> str:
    """Parities as Markdown."""
    names = ("trained", "network in", "two processes", "gradient norm", "all logged", "weights", "averaged weights")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for trained, precision, strategy, p in rows:
        cells = (f"{value:.0e}" for value in (p.grad_norm, p.logged, p.weights, p.ema))
        lines.append(f"| {trained} | {precision} | {strategy} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        made, found, singles = prepare(Path(scratch)), [], {}
        for number, (trained, precision, strategy, more, named) in enumerate(CASES):
            options = (*adapter_options(trained), "--model.precision", precision, *more)
            if options not in singles:
                singles[options] = run(made, f"one-{number}", *options)
            before = initial(made, trained, "--model.precision", precision)
            pair = run(made, f"two-{number}", *options, "--distributed.strategy", strategy, count=2)
            found.append((trained + named, precision, strategy, compare(singles[options], pair, before)))
        print(table(found))
    sys.exit(0)
