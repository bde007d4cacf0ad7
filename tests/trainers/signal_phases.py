"""What a signal does in each phase of a run; `python -m tests.trainers.signal_phases` prints the table.

A run of three epochs sends itself a signal inside a phase of the second one, and is resumed. Phases are entered by
wrapping the functions that do their work; the wrapped ones still do it.
"""

import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import reproducible, weights, write_config
from tests.trainers.world import all_succeed, command, in_processes
from trainers.run_folder.checkpoint import is_intact, list_checkpoints

PHASES = ("sampling", "rewards", "training", "logging", "evaluation", "checkpointing", "first evaluation")
GROUPS = ("weights", "optimizer", "ema")
SETTINGS = ("--evaluation.every_epochs", "2", "--checkpoints.every_epochs", "2", "--batch.sample_batch_size", "8")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a signal did, and whether the resumed run is the undisturbed one."""

    phase: str
    signal: str
    statuses: list[int]
    message: str
    checkpoints: list[str]
    intact: bool
    resumed: int
    equal: bool


def prepare(folder: Path, *extra: str, count: int = 1) -> Path:
    """A tiny model and a configuration in `folder`, and the undisturbed run."""
    tiny_stable_diffusion().save_pretrained(folder / "model", safe_serialization=True)
    config = write_config(folder, folder / "model")
    arguments = ["train", str(config), "--run.name", "whole", *SETTINGS, *extra]
    all_succeed(command, arguments, count=count, log=folder / "whole.log")
    return config


def disturb(
    config: Path, phase: str, number: signal.Signals, *extra: str, count: int = 1, ranks: Sequence[int] = (0,)
) -> Outcome:
    """Starts a run that is told to stop within `phase`, on the given ranks; resumes it."""
    name = f"{phase}-{number.name}".replace(" ", "-")
    log, run = config.parent / f"{name}.log", config.parent / "runs" / name
    arguments = ["train", str(config), "--run.name", name, *SETTINGS, *extra]
    statuses = in_processes(train_and_signal, arguments, phase, int(number), tuple(ranks), count=count, log=log)
    message = re.search(r"stopped by .*", Path(f"{log}.0").read_text())
    checkpoints = list_checkpoints(run)
    resumed = in_processes(command, ["train", "--resume", str(run)], count=count, log=log)
    whole = run.with_name("whole")
    first, second = weights(whole, *GROUPS), weights(run, *GROUPS)
    same = first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    return Outcome(
        phase=phase,
        signal=number.name,
        statuses=statuses,
        message=message[0] if message else Path(f"{log}.0").read_text()[-500:],
        checkpoints=[path.name for path in checkpoints],
        intact=all(is_intact(path) for path in checkpoints),
        resumed=max(resumed),
        equal=same and reproducible(whole) == reproducible(run),
    )


def train_and_signal(arguments: list[str], phase: str, number: int, ranks: tuple[int, ...]) -> None:
    """The body of a process: the command, with a signal to itself in the second epoch's `phase`."""
    if int(os.environ.get("RANK", "0")) in ranks:
        _arm(phase, lambda: os.kill(os.getpid(), number))
    command(arguments)


def _arm(phase: str, send: Callable[[], None]) -> None:
    import trainers.epoch.binding
    import trainers.epoch.sample
    import trainers.evaluation.evaluator
    import trainers.loop
    import trainers.run_folder.checkpoint
    from rewards import WeightedSum
    from trainers.epoch.drift import Gate

    entered = {
        "sampling": (trainers.epoch.sample, "rollout", 2),
        "rewards": (WeightedSum, "components", None),
        "training": (Gate, "check", 3),  # after its first backward passes, before an optimizer step
        "logging": (trainers.loop, "_log", 2),
        # noisy and noise-free at the start, then at epoch 2
        "evaluation": (trainers.evaluation.evaluator, "rollout", 4),
        "checkpointing": (trainers.run_folder.checkpoint, "save_file", 2),
        "first evaluation": (trainers.evaluation.evaluator, "rollout", 1),
    }
    owner, name, which = entered[phase]
    real, calls = getattr(owner, name), []

    def wrapped(*positional: object, **keywords: object) -> object:
        calls.append(1)
        if phase == "rewards":
            if _second_epoch():
                send()
                time.sleep(0.7)  # the reward goes on while the run stops
        elif len(calls) == which:
            send()
        return real(*positional, **keywords)

    setattr(owner, name, wrapped)
    if phase == "rewards":
        score = trainers.epoch.binding.score

        def counted(*positional: object, **keywords: object) -> object:
            _EPOCHS.append(1)
            return score(*positional, **keywords)

        trainers.epoch.binding.score = counted


_EPOCHS: list[int] = []


def _second_epoch() -> bool:
    return len(_EPOCHS) == 2


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as Markdown."""
    rows = ["| signal | during | exit status | cost | checkpoints | resumed run = undisturbed run |", "|" + "---|" * 6]
    for o in outcomes:
        cost = re.search(r": (.*?);", o.message)
        bits = "bit for bit" if o.equal and o.resumed == 0 else "NO"
        rows.append(
            f"| {o.signal} | {o.phase} | {', '.join(map(str, o.statuses))} | {cost[1] if cost else '?'} | "
            f"{', '.join(o.checkpoints)}{'' if o.intact else ' DAMAGED'} | {bits} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        made = prepare(Path(scratch))
        cases = [(phase, signal.SIGTERM) for phase in PHASES]
        cases += [("training", number) for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)]
        print(table([disturb(made, *case) for case in cases]))
    sys.exit(0)
