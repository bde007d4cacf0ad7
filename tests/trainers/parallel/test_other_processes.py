"""What a process does when another one of its run means another run, fails, or is gone."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import ROOT, environment, write_config
from tests.trainers.parallel.test_launchers import SCONTROL, SRUN
from tests.trainers.world import command, in_processes
from trainers.parallel.agreement import fingerprint

SMALL = ("--evaluation.every_epochs", "0", "--evaluation.ode", "false", "--tracking.pictures_every_epochs", "0")
PICKY = """\
import os

bad = None

def picky(images, prompts, metadata):
    global bad
    levels = [float(image.sum()) for image in images]
    if os.environ["RANK"] == "1" and len(images) == 4:
        bad = levels[2]
    if bad in levels:
        raise KeyError("cross")
    return images.mean((1, 2, 3))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("others")
    tiny_stable_diffusion().save_pretrained(folder / "model", safe_serialization=True)
    tiny_stable_diffusion(seed=1).save_pretrained(folder / "other", safe_serialization=True)
    return write_config(folder, folder / "model")


def rank() -> int:
    return int(os.environ["RANK"])


def told_apart(arguments: list[str], own: list[str]) -> None:
    """The command, with more words in the second process."""
    command([*arguments, *(own if rank() == 1 else [])])


def with_other_weights(arguments: list[str], model: str, other: str) -> None:
    """The command; the second process finds another model at the same place."""
    import diffusers

    load = diffusers.DiffusionPipeline.from_pretrained.__func__
    place = other if rank() == 1 else model

    def elsewhere(cls: type, path: str, **options: object) -> object:
        return load(cls, place if path == model else path, **options)

    diffusers.DiffusionPipeline.from_pretrained = classmethod(elsewhere)
    command(arguments)


def killed_in_training(arguments: list[str]) -> None:
    """The command; the second process is killed in the second epoch's training."""
    from trainers.epoch.drift import Gate

    check, calls = Gate.check, []

    def lethal(*positional: object) -> None:
        calls.append(1)
        if len(calls) == 3 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        check(*positional)

    Gate.check = lethal
    command(arguments)


def errors(log: Path) -> list[str]:
    """The lines of both processes that say why they ended."""
    lines = [line for rank in (0, 1) for line in Path(f"{log}.{rank}").read_text().splitlines()]
    assert not any("Traceback" in line for line in lines), "\n".join(lines)
    return [line for line in lines if line.startswith("error") or "has lost another one" in line]


def test_processes_of_different_configurations_do_not_train(config: Path) -> None:
    log = config.parent / "config.log"
    arguments = ["train", str(config), "--run.name", "apart", *SMALL]
    own = ["--seed", "7", "--optimizer.learning_rate", "1e-2"]
    assert in_processes(told_apart, arguments, own, count=2, log=log) == [2, 2]
    (line,) = errors(log)
    assert "process 1 was given another configuration than process 0: " in line
    assert "optimizer.learning_rate 0.01, not 0.001, seed 7, not 0;" in line
    assert not (config.parent / "runs" / "apart").exists()


def test_processes_of_different_base_weights_do_not_train(config: Path) -> None:
    log = config.parent / "weights.log"
    arguments = ["train", str(config), "--run.name", "weights", *SMALL]
    model, other = str(config.parent / "model"), str(config.parent / "other")
    assert in_processes(with_other_weights, arguments, model, other, count=2, log=log) == [2, 2]
    (line,) = errors(log)
    assert "process 1 has loaded other weights than process 0: text_encoder " in line and " unet " in line
    assert not (config.parent / "runs" / "weights").exists()


def test_a_reward_that_fails_in_one_process_is_told_once_with_the_samples_number(config: Path) -> None:
    log, reward = config.parent / "reward.log", config.parent / "picky.py"
    reward.write_text(PICKY)
    arguments = ["train", str(config), "--run.name", "reward", "--rewards.0.name", f"{reward}:picky", *SMALL]
    assert in_processes(command, arguments, count=2, log=log) == [2, 2]
    (line,) = errors(log)
    assert line.startswith("error (process 1): reward 'picky' raised KeyError: 'cross'")
    assert "for sample 6 (prompt " in line  # the third of the second process's four


def test_a_process_that_loses_another_names_the_last_checkpoint_and_can_be_requeued(config: Path) -> None:
    log, run = config.parent / "lost.log", config.parent / "runs" / "lost"
    arguments = ["train", str(config), "--run.name", "lost", *SMALL]
    assert in_processes(killed_in_training, arguments, count=2, log=log) == [75, -signal.SIGKILL]
    (line,) = errors(log)
    assert f"the last checkpoint is {run / 'checkpoints' / 'epoch_000001'}; continue with: ddpo train --resume" in line
    assert in_processes(command, ["train", "--resume", str(run)], count=2, log=log) == [0, 0]


def test_a_name_that_is_taken_is_told_once_and_asks_for_no_requeue(config: Path) -> None:
    """The main process alone makes the folder; the other one waits for its name."""
    taken, log = config.parent / "runs" / "taken", config.parent / "taken.log"
    metrics = taken / "metrics.jsonl"
    taken.mkdir(parents=True)
    metrics.write_text('{"epoch": 1}\n')
    assert in_processes(command, ["train", str(config), "--run.name", "taken", *SMALL], count=2, log=log) == [2, 2]
    (line,) = errors(log)
    assert line.startswith(f"error (process 0): {taken} exists already")
    assert metrics.read_text() == '{"epoch": 1}\n'


def test_a_fingerprint_tells_weights_types_and_names_and_not_devices_or_order() -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    second = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    second.load_state_dict(first.state_dict())
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(second.to(torch.bfloat16)) != fingerprint(first)
    second.float().load_state_dict(first.state_dict())
    with torch.no_grad():
        second[0].weight[1, 2] = torch.nextafter(second[0].weight[1, 2], torch.tensor(9.0))
    assert fingerprint(second) != fingerprint(first), "one bit"
    assert fingerprint(nn.ModuleDict({"a": first[0]})) != fingerprint(nn.ModuleDict({"b": first[0]}))


def test_a_slurm_job_that_lost_a_process_is_requeued_while_it_gets_on(tmp_path: Path) -> None:
    """The batch script with a command that writes a checkpoint and ends as the processes that are left do."""
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\n[[ -z $NEXT ]] || mkdir -p "$RUNS/job-42/checkpoints/$NEXT"\nexit "$STATUS"\n')
    for path, text in ((tmp_path / "srun", SRUN), (tmp_path / "scontrol", SCONTROL), (python, python.read_text())):
        path.write_text(text)
        path.chmod(0o755)
    settings = {
        **environment(), "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(python),
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "here",
        "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "RUNS": str(tmp_path), "CALLS": str(tmp_path / "calls"),
    }  # fmt: skip
    for status, checkpoint, requeued in (
        (75, "epoch_000001", 1), (75, "", 1), (137, "epoch_000002", 2), (2, "epoch_000003", 2), (0, "epoch_000004", 2)
    ):  # fmt: skip
        line = ["bash", str(ROOT / "scripts" / "slurm" / "single_node.sbatch"), "config"]
        given = {**settings, "NEXT": checkpoint, "STATUS": str(status)}
        assert subprocess.run(line, env=given, cwd=ROOT, timeout=60, check=False).returncode == status
        assert (tmp_path / "calls").read_text() == "requeue 42\n" * requeued
