"""Sweeps of real tiny runs: what trains, what is kept, what goes on, what a signal and a failure do."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ddpo.validation import UserError
from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import ROOT, environment, reproducible, start, weights, write_config
from trainers.cli import main
from trainers.config.io import ConfigError, load_config, to_yaml
from trainers.evaluation.evaluator import Evaluation
from trainers.parallel.interruption import RunStopped
from trainers.run_folder.checkpoint import checkpoint_path
from trainers.run_folder.folder import RunFolder, read_metrics
from trainers.sweep import launch
from trainers.sweep.bar import Bar
from trainers.sweep.launch import Task, train_all
from trainers.sweep.outcome import write_table
from trainers.sweep.plan import Sweep, make_member, standing
from trainers.sweep.weights import plan_weights

SHORT = ["--epochs", "2", "--evaluation.ode", "false"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    tiny_stable_diffusion().save_pretrained(folder / "tiny-sd", safe_serialization=True)
    return write_config(folder, folder / "tiny-sd")


def sweep_command(config: Path, output: Path, *words: str) -> list[str]:
    return ["sweep", str(config), *SHORT, "--run.output_dir", str(output), *words]


def test_a_sweep_trains_what_it_lacks_and_ends_with_table_and_report(config, tmp_path, capsys, monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    grid = ["--grid", "kl.target=0.01,1", "--jobs", "2"]
    assert main(sweep_command(config, tmp_path, *grid, "--dry-run")) == 0
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out.count("new") == 2
    assert main(sweep_command(config, tmp_path, *grid)) == 0
    printed, folder = capsys.readouterr().out, tmp_path / "tiny-sweep"
    runs = [folder / f"target={target}_seed=0" for target in ("0.01", "1")]
    assert all(
        load_config(run / "config.yaml").kl.target == target for run, target in zip(runs, (0.01, 1), strict=True)
    )
    assert [[row["epoch"] for row in read_metrics(run)] for run in runs] == [[1, 2], [1, 2]]
    assert "pretrained" in printed and str(folder / "report.html") in printed
    page = (folder / "report.html").read_text()
    assert all(run.name in page for run in runs) and "What differs" in page
    alone = start(config, *SHORT, "--run.output_dir", str(tmp_path), "--kl.target", "1", "--run.name", "alone")
    assert reproducible(alone) == reproducible(runs[1]), "a run of a sweep is the run that it would be by itself"

    stamps = [(run / "summary.json").stat().st_mtime_ns for run in runs]
    assert main(sweep_command(config, tmp_path, *grid)) == 0
    assert [(run / "summary.json").stat().st_mtime_ns for run in runs] == stamps, "finished runs are not run again"
    assert capsys.readouterr().out.count("finished") == 2
    assert main(sweep_command(config, tmp_path, *grid, "--sampler.num_steps", "2")) == 2
    assert "sampler.num_steps (saved 3, now 2)" in capsys.readouterr().err


def test_a_killed_run_goes_on_from_its_checkpoint_and_ctrl_c_saves_the_run_at_work(config, tmp_path):
    """The sweep is interrupted, then a run of it killed; the runs end bit for bit as one that nobody disturbed."""
    whole = start(config, "--epochs", "3", "--run.output_dir", str(tmp_path), "--run.name", "whole")
    line = [sys.executable, "-m", "trainers", "sweep", str(config), "--epochs", "3", "--run.output_dir", str(tmp_path),
            "--name", "all", "--seeds", "2"]  # fmt: skip
    runs = [tmp_path / "all" / f"seed={seed}" for seed in (0, 1)]
    restored = (  # a test that runs in the background has SIGINT ignored
        "import signal, sys, os; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    first = subprocess.Popen([sys.executable, "-c", restored, *line], cwd=ROOT, env=environment(), text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    wait_for(lambda: checkpoint_path(runs[0], 1).is_dir(), first)
    os.killpg(first.pid, signal.SIGINT)
    _, errors = first.communicate(timeout=200)
    assert first.returncode == 75, errors
    assert "SIGINT: 2 of 2 runs have not ended; the same command goes on where they stopped" in errors
    assert not runs[1].exists(), "no run is begun any more"

    second = subprocess.Popen(
        line, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for(lambda: checkpoint_path(runs[1], 1).is_dir(), second)
    owner = int((runs[1] / ".lock").read_text().split()[1])
    os.kill(owner, signal.SIGKILL)
    printed, errors = second.communicate(timeout=300)
    assert second.returncode == 1, errors
    assert "error: seed=1 failed (killed by SIGKILL)" in errors and "1 of 2 runs have not ended" in printed
    assert reproducible(runs[0]) == reproducible(whole)
    expected, found = weights(whole, "weights", "optimizer", "ema"), weights(runs[0], "weights", "optimizer", "ema")
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    third = subprocess.run(line, cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=300)
    assert third.returncode == 0, third.stderr
    assert [row["epoch"] for row in read_metrics(runs[1])] == [1, 2, 3]
    assert "resumed from" in (tmp_path / "all" / "seed=1.log").read_text()


def wait_for(happened, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_that_fails_is_listed_and_the_others_train(config, tmp_path, capsys, monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "my.py").write_text(
        "def fine(images, prompts, metadata): return images.mean((1, 2, 3))\n"
        "def broken(images, prompts, metadata): raise RuntimeError('no camera')\n"
    )
    names = f"{tmp_path / 'my.py'}:broken,{tmp_path / 'my.py'}:fine"
    command = sweep_command(config, tmp_path, "--grid", f"rewards.0.name={names}", "--name", "two", "--epochs", "1")
    assert main(command) == 1
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "status 2" in line and "no camera" in line and ".log]" in line
    assert "1 of 2 runs have not ended" in captured.out
    finished = [path.parent.name for path in (tmp_path / "two").glob("*/summary.json")]
    assert len(finished) == 1


# ---- what each run is to do ------------------------------------------------------------------------------------------


def begin(config: Path, run: Path, *, weight: int, done: int, ended: bool, changes: tuple[str, ...] = ()) -> None:
    """A run folder of the sweep as a run of `done` epochs leaves it."""
    own = ["--run.output_dir", str(run.parent), "--run.name", run.name, "--rewards.0.weight", str(weight), *changes]
    RunFolder.create(run.parent, run.name, to_yaml(load_config(config, own), full=True))
    if done:
        checkpoint_path(run, done).mkdir()
        (checkpoint_path(run, done) / "manifest.json").write_text("{}")
    if ended:
        (run / "summary.json").write_text("{}")


def test_each_run_starts_goes_on_or_is_kept_by_what_it_has_done(tmp_path):
    config, runs = write_config(tmp_path, tmp_path), tmp_path / "runs"
    run = {weight: runs / f"tiny-brightness-{weight}" for weight in (1, 2, 3, 4, 5, 6)}
    begin(config, run[1], weight=1, done=3, ended=True)
    begin(config, run[2], weight=2, done=0, ended=False)  # killed before its first checkpoint
    begin(config, run[3], weight=3, done=2, ended=False)
    begin(config, run[4], weight=4, done=1, ended=True, changes=("--epochs", "1"))
    begin(config, run[5], weight=5, done=2, ended=True)  # stopped early by itself
    sweep = plan_weights(str(config), "brightness=1,2,3,4,5,6,6", [])
    assert [member.run for member in sweep.members] == list(run.values())
    found = [standing(sweep, member) for member in sweep.members]
    assert [one.state for one in found] == ["finished", "goes on", "goes on", "goes on", "finished", "new"]
    assert [one.epochs for one in found] == [3, 0, 2, 1, 2, 0]
    assert [one.arguments for one in found[:5]] == [
        (), ("--resume", str(run[2])), ("--resume", str(run[3])), ("--resume", str(run[4]), "--epochs=3"), ()
    ]  # fmt: skip
    config_file, *overrides = found[5].arguments
    assert load_config(config_file, overrides) == sweep.members[5].config
    assert sweep.members[5].config.rewards[0].weight == 6


def test_a_run_resumed_since_its_summary_goes_on(tmp_path):
    config, run = write_config(tmp_path, tmp_path), tmp_path / "runs" / "tiny-brightness-1"
    begin(config, run, weight=1, done=2, ended=True)
    later = (run / "summary.json").stat().st_mtime_ns + 10**9
    os.utime(run / "config.yaml", ns=(later, later))
    sweep = plan_weights(str(config), "brightness=1", [])
    assert standing(sweep, sweep.members[0]).arguments == ("--resume", str(run))


@pytest.mark.parametrize(
    ("done", "changes", "error", "message"),
    [
        (3, ("--sampler.num_steps", "2"), ConfigError, r"sampler.num_steps \(saved 2, now 3\)"),
        (9, ("--epochs", "9"), UserError, "has trained for 9 epochs, not 3"),
    ],
)
def test_a_folder_that_holds_another_run_is_refused(tmp_path, done, changes, error, message):
    config = write_config(tmp_path, tmp_path)
    begin(config, tmp_path / "runs" / "tiny-brightness-2", weight=2, done=done, ended=True, changes=changes)
    sweep = plan_weights(str(config), "brightness=1,2", [])
    with pytest.raises(error, match=message):
        [standing(sweep, member) for member in sweep.members]


def test_the_table_has_the_standard_error_over_seeds(config, tmp_path):
    """Three runs of one value, one of another; their last evaluations are written here."""
    means = {("0.1", 0): 0.3, ("0.1", 1): 0.5, ("0.1", 2): 0.4, ("0.2", 0): 0.9}
    members = []
    for (alpha, seed), mean in means.items():
        run = tmp_path / f"alpha={alpha}_seed={seed}"
        member = make_member(str(config), run, [f"--kl.alpha={alpha}", f"--seed={seed}"], {"kl.alpha": alpha})
        RunFolder.create(tmp_path, run.name, to_yaml(member.config, full=True))
        for epoch, value in ((0, 0.2), (3, mean)):
            Evaluation(
                values={"brightness": torch.tensor([value - 0.1, value + 0.1])},
                images=torch.zeros(2, 3, 2, 2, dtype=torch.uint8), prompts=("a", "b"),
            ).save(RunFolder(path=run).evaluation(epoch))  # fmt: skip
        members.append(member)
    text = write_table(Sweep(source=str(config), folder=tmp_path, members=tuple(members)), members)
    (three, single) = json.loads((tmp_path / "sweep.json").read_text())
    assert three["values"] == {"kl.alpha": "0.1"} and len(three["runs"]) == 3
    assert three["measures"]["brightness"]["mean"] == pytest.approx(0.4)
    assert three["measures"]["brightness"]["error"] == pytest.approx(statistics.stdev([0.3, 0.5, 0.4]) / 3**0.5)
    assert single["measures"]["brightness"]["error"] is None
    assert "0.4 ± 0.058" in text and [line.split()[0] for line in text.splitlines()[2:5]] == [
        "pretrained",
        "0.1",
        "0.2",
    ]


# ---- processes -------------------------------------------------------------------------------------------------------


def test_jobs_run_beside_each_other_and_never_more_than_asked_for(tmp_path, monkeypatch):
    """Stand-ins for training: each waits until it has seen the other, which one after the other would never do."""
    program = tmp_path / "run"
    program.write_text(f"""#!{sys.executable}
import sys, time
from pathlib import Path
own, folder = sys.argv[-1], Path({str(tmp_path)!r})
(folder / f"at-work-{{own}}").touch()
deadline = time.monotonic() + 20
seen = 0
while time.monotonic() < deadline and seen < 2:
    seen = max(seen, len(list(folder.glob("at-work-*"))))
    time.sleep(.01)
time.sleep(.3)
(folder / f"most-{{own}}").write_text(str(max(seen, len(list(folder.glob("at-work-*"))))))
(folder / f"at-work-{{own}}").unlink()
""")
    program.chmod(0o755)
    monkeypatch.setattr(launch.sys, "executable", str(program))
    tasks = [Task(run=tmp_path / str(i), arguments=(str(i),)) for i in range(4)]
    bar = Bar({}, done=0, total=4)
    assert train_all(tasks, jobs=2, bar=bar) == []
    assert [(tmp_path / f"most-{i}").read_text() for i in range(4)] == ["2"] * 4


def test_a_second_signal_is_passed_on_too(tmp_path):
    """The stand-in saves itself for ever; only the second signal ends it."""
    program = tmp_path / "run"
    program.write_text(f"""#!{sys.executable}
import signal, time
from pathlib import Path
def stop(number, frame):
    signal.signal(number, signal.SIG_DFL)
    Path({str(tmp_path / "told")!r}).touch()
signal.signal(signal.SIGTERM, stop)
Path({str(tmp_path / "ready")!r}).touch()
time.sleep(120)
time.sleep(120)
""")
    program.chmod(0o755)
    code = f"""
import sys
from pathlib import Path
from trainers.sweep.bar import Bar
from trainers.sweep.launch import Task, train_all
sys.executable = {str(program)!r}
folder = Path({str(tmp_path)!r})
tasks = [Task(run=folder / name, arguments=()) for name in "ab"]
train_all(tasks, jobs=1, bar=Bar({{}}, done=0, total=2))
"""
    sweeping = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    wait_for((tmp_path / "ready").exists, sweeping)
    sweeping.send_signal(signal.SIGTERM)
    wait_for((tmp_path / "told").exists, sweeping)
    sweeping.send_signal(signal.SIGTERM)
    _, errors = sweeping.communicate(timeout=60)
    assert f"{RunStopped.__name__}: SIGTERM: 2 of 2 runs have not ended" in errors


def test_jobs_share_cores_and_have_gpus_in_turn(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch.os, "cpu_count", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    assert [launch.environment(slot, 4)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == ["2", "5", "7", "2"]
    assert launch.environment(0, 4)["OMP_NUM_THREADS"] == "2"
    assert launch.environment(0, 1)["CUDA_VISIBLE_DEVICES"] == "2,5,7" and "OMP_NUM_THREADS" not in launch.environment(
        0, 1
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch.environment(1, 4)["OMP_NUM_THREADS"] == "3"


# ---- SLURM -----------------------------------------------------------------------------------------------------------


def test_an_array_task_warned_of_its_end_is_requeued_and_goes_on(config, tmp_path):
    """bash runs the file as SLURM would, a stand-in for scontrol notes what is asked of it."""
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$*" >> "$CALLS"\n')
    (tmp_path / "scontrol").chmod(0o755)
    file = tmp_path / "sweep.sbatch"
    words = ["--epochs", "3", "--run.output_dir", str(tmp_path), "--name", "array", "--grid", "kl.target=0.01,1",
             "--seeds", "2"]  # fmt: skip
    assert main(["sweep", str(config), *words, "--slurm", str(file), "--jobs", "3"]) == 0
    assert not list((tmp_path / "array").iterdir()), "nothing has trained"
    assert "#SBATCH --array=0-3%3\n" in file.read_text() and "#SBATCH --signal=B:USR1@120\n" in file.read_text()
    told = {**environment(), "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"),
            "SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": "2"}  # fmt: skip
    first = subprocess.Popen(["bash", str(file)], env=told, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    run = tmp_path / "array" / "target=1_seed=0"
    wait_for(lambda: checkpoint_path(run, 1).is_dir(), first)
    first.send_signal(signal.SIGUSR1)
    printed = first.communicate(timeout=200)[0]
    assert first.returncode == 75, printed
    assert (tmp_path / "calls").read_text() == "requeue 42_2\n"
    second = subprocess.run(["bash", str(file)], env=told, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0 and "resumed from" in second.stderr, second.stderr
    assert [row["epoch"] for row in read_metrics(run)] == [1, 2, 3]
    again = subprocess.run(["bash", str(file)], env=told, capture_output=True, text=True, timeout=100)
    assert (again.returncode, again.stdout.strip()) == (0, "target=1_seed=0: finished")
    assert (tmp_path / "calls").read_text() == "requeue 42_2\n", "a finished task is not requeued"
    assert main(["sweep", str(config), *words, "--slurm", str(file)]) == 0
    assert "#SBATCH --array=0-1,3\n" in file.read_text(), "what is finished needs no task"
