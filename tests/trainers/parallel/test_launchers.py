"""The launch scripts as a cluster runs them: two torchrun agents that meet, and the two lives of a SLURM job."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.trainers.loop_helpers import ROOT, environment, reproducible, weights
from tests.trainers.parity_of_strategies import SETTINGS, compare, initial, prepare, run
from tests.trainers.world import free_port

SCRIPTS = ROOT / "scripts"

# What the batch script needs of SLURM: as many tasks as the job has, with their ranks, and signals passed on to them.
SRUN = """#!/bin/bash
pids=()
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    pids+=($!)
done
trap 'kill -USR1 "${pids[@]}"' USR1
status=0
for pid in "${pids[@]}"; do
    while true; do
        code=0; wait "$pid" || code=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    wait "$pid"; code=$?
    ((code > status)) && status=$code
done
exit "$status"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$*" >> "$CALLS"; fi
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("launchers"))


def test_two_torchrun_agents_meet_and_train_as_one_process(config: Path) -> None:
    script, port = str(SCRIPTS / "torchrun_node.sh"), free_port()
    settings = {**environment(), "NODES": "2", "PER_NODE": "1", "PYTHON": sys.executable}
    line = ["bash", script, f"127.0.0.1:{port}", "train", str(config), "--run.name", "nodes", *SETTINGS]
    agents = [
        subprocess.Popen(line, env=settings, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    printed = [agent.communicate(timeout=240)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(printed)[-3000:]
    assert "processes     2" in "".join(printed)
    one = run(config, "one")
    parity = compare(one, config.parent / "runs" / "nodes", initial(config, "lora"))
    assert parity.logged < 1e-3
    assert parity.weights < 1e-2


def test_a_slurm_job_warned_of_its_end_is_requeued_and_goes_on_bit_exactly(config: Path, tmp_path: Path) -> None:
    whole = run(config, "undisturbed")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    settings = {
        **environment(), "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable,
        "CALLS": str(tmp_path / "calls"),
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "here",
        "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "RUNS": str(tmp_path / "runs"),
    }  # fmt: skip
    line = ["bash", str(SCRIPTS / "slurm" / "single_node.sbatch"), str(config), *SETTINGS]
    job = tmp_path / "runs" / "job-42"
    first = subprocess.Popen(line, env=settings, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (job / "evaluations" / "epoch_000000.safetensors").is_file():
        assert first.poll() is None, first.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGUSR1)
    printed = first.communicate(timeout=120)[0]
    assert first.returncode == 75, printed
    assert "stopped by SIGUSR1" in printed
    assert (tmp_path / "calls").read_text() == "requeue 42\n"
    second = subprocess.run(line, env=settings, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert second.returncode == 0, second.stderr
    assert "resumed from" in second.stderr
    assert (tmp_path / "calls").read_text() == "requeue 42\n", "a finished job is not requeued"
    groups = ("weights", "optimizer", "ema")
    expected, found = weights(whole, *groups), weights(job, *groups)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert reproducible(whole) == reproducible(job)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_scripts_pass_shellcheck() -> None:
    scripts = [*SCRIPTS.glob("slurm/*"), *SCRIPTS.glob("*.sh")]
    subprocess.run(["shellcheck", "-x", *map(str, scripts)], check=True, cwd=ROOT)


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("slurm/*.sbatch")), ids=lambda path: path.name)
def test_a_batch_file_is_warned_before_its_end_and_may_be_requeued(path: Path) -> None:
    headers = {line for line in path.read_text().splitlines() if line.startswith("#SBATCH")}
    assert {"#SBATCH --signal=B:USR1@120", "#SBATCH --requeue", "#SBATCH --open-mode=append"} <= headers


def test_the_skypilot_task_and_the_accelerate_files_are_yaml_that_start_as_many_processes_as_they_say() -> None:
    task = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
    assert {"resources", "setup", "run"} <= set(task)
    subprocess.run(["bash", "-n", "-c", task["run"]], check=True)
    for path in (ROOT / "configs" / "accelerate").glob("*.yaml"):
        settings = yaml.safe_load(path.read_text())
        assert settings["distributed_type"] in ("NO", "MULTI_GPU"), path
        assert settings["num_processes"] % settings["num_machines"] == 0
