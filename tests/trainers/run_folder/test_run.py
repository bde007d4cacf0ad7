"""Run folders: made before anything heavy, appended line by line, readable after a kill."""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.trainers.loop_helpers import ROOT
from trainers.config import Config
from trainers.config.groups import RunConfig
from trainers.parallel.processes import Processes
from trainers.run_folder.environment import git_state
from trainers.run_folder.folder import RunError, RunFolder, _jsonable, read_metrics
from trainers.run_folder.husks import make_way, sweep
from trainers.run_folder.lock import held
from trainers.session import create_run


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "runs", "first", "seed: 3\n")


def test_create_writes_config_environment_and_folders(run):
    assert sorted(path.name for path in run.path.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "environment.json",
        "files.json",
        "metrics.jsonl",
        "pictures",
    ]
    assert run.name == "first"
    assert run.config_file.read_text() == "seed: 3\n"
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(environment["packages"]) >= {"torch", "diffusers", "transformers", "accelerate", "peft"}
    assert environment["device"]["names"]
    assert environment["command"]


def test_a_kill_while_the_folder_is_made_blocks_nothing(tmp_path):
    """A process that is killed inside `create`, and another that makes the run after it."""
    script = (
        "import os, sys, trainers.run_folder.folder\n"
        "trainers.run_folder.folder.describe_environment = lambda: os.kill(os.getpid(), 9)\n"
        "trainers.run_folder.folder.RunFolder.create(sys.argv[1], 'first', 'seed: 3\\n')\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=False)
    assert killed.returncode == -9
    assert not (tmp_path / "first").exists()
    run = RunFolder.create(tmp_path, "first", "seed: 4\n")
    assert RunFolder.open(tmp_path / "first").config_file.read_text() == "seed: 4\n"
    run.note_resume("none")


def test_an_error_while_the_folder_is_made_leaves_nothing(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("no environment")

    monkeypatch.setattr("trainers.run_folder.folder.describe_environment", fail)
    with pytest.raises(RuntimeError, match="no environment"):
        RunFolder.create(tmp_path, "first", "")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_or_a_file_of_the_name(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert RunFolder.create(tmp_path, "empty", "").path == tmp_path / "empty"
    with pytest.raises(RunError, match="file exists already"):
        RunFolder.create(tmp_path, "file", "")


def test_a_new_run_takes_the_place_of_one_that_never_finished_an_epoch_and_of_no_other(tmp_path):
    names = ("trained", "saved", "exported", "noted", "busy", "unused")
    trained, saved, exported, noted, busy, unused = (RunFolder.create(tmp_path, name, "") for name in names)
    trained.append_metrics({"epoch": 1})
    (saved.checkpoints / "epoch_000001").mkdir()
    exported.lora.mkdir()
    (noted.path / "notes.txt").write_text("years of notes")
    (unused.checkpoints / "epoch_000000").mkdir()
    with held(busy, Processes(device="cpu")), pytest.raises(RunError, match="is being trained by another process"):
        make_way(busy.path)
    made_way = {run.name: make_way(run.path) for run in (trained, saved, exported, noted, unused)}
    assert {name for name, line in made_way.items() if line} == {"unused"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["busy", "exported", "noted", "saved", "trained"]
    assert make_way(tmp_path / "nothing") is None


def test_what_killed_starts_left_is_swept_an_hour_later(tmp_path):
    old, young = (tmp_path / f".partial_{letter * 32}" for letter in "ab")
    own = tmp_path / ".partial_of_mine"
    for folder in (old, young, own):
        folder.mkdir()
    for folder in (old, own):
        os.utime(folder, (0, 0))
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, own.name]


def test_a_new_configuration_replaces_the_old_one_at_once(run):
    run.save_config("seed: 5\n")
    assert run.config_file.read_text() == "seed: 5\n"
    assert [path.name for path in run.path.iterdir() if path.name.startswith(".")] == []


def test_resumes_are_added_to_the_environment(run):
    run.note_resume("epoch_000005")
    run.note_resume("epoch_000010")
    environment = json.loads((run.path / "environment.json").read_text())
    assert [entry["checkpoint"] for entry in environment["resumed"]] == ["epoch_000005", "epoch_000010"]
    assert "torch" in environment["resumed"][0]["packages"]


def test_default_names_never_collide(tmp_path):
    names = [RunFolder.create(tmp_path, None, "", stem="shapes ppo/1").name for _ in range(3)]
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_shapes-ppo-1(-\d)?", name) for name in names)


def test_a_tilde_in_output_dir_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = Config(run=RunConfig(output_dir="~/runs", name="a"))
    assert create_run(config, Processes(device="cpu"), yaml="seed: 3\n").path == tmp_path / "home" / "runs" / "a"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_taken_name_is_refused_with_both_ways_out(run):
    with pytest.raises(RunError, match=r"first exists already: choose another --run.name, or .*--resume .*first"):
        RunFolder.create(run.path.parent, "first", "")


@pytest.mark.parametrize("name", ["a/b", "..", "", ".hidden", "-x", "a b"])
def test_a_name_that_is_no_plain_folder_name_is_refused(tmp_path, name):
    with pytest.raises(RunError, match="run.name must be"):
        RunFolder.create(tmp_path, name, "")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_refused_with_the_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write a run folder in .*file/runs: Not a directory; choose a writable"):
        RunFolder.create(tmp_path / "file" / "runs", None, "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="Permission denied"):
        RunFolder.create(tmp_path, "a", "")


def test_opening_what_is_no_run_names_the_runs_beside_it(run):
    assert RunFolder.open(run.path) == run
    with pytest.raises(RunError, match="no config.yaml.*the runs in .* are first"):
        RunFolder.open(run.path.parent / "second")


def test_metrics_come_back_exactly_and_non_finite_ones_as_null(run):
    run.append_metrics(
        {"epoch": 1, "reward": 0.1 + 0.2, "kl": np.float64(1e-300), "steps": [1.0, math.nan], "note": "a"}
    )
    run.append_metrics({"epoch": np.int64(2), "reward": math.inf, "ok": True, "single": np.float32(0.5)})
    assert read_metrics(run.path) == [
        {"epoch": 1, "reward": 0.1 + 0.2, "kl": 1e-300, "steps": [1.0, None], "note": "a"},
        {"epoch": 2, "reward": None, "ok": True, "single": 0.5},
    ]


def test_a_metric_that_is_no_number_is_refused_by_name(run):
    with pytest.raises(TypeError, match="metric 'images' is a dict"):
        run.append_metrics({"epoch": 1, "images": {}})


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_metric_keeps_every_bit(value):
    assert json.loads(json.dumps(_jsonable("x", value))).hex() == value.hex()


@pytest.mark.parametrize("tail", ['{"epoch": 3, "rew', '{"epoch": 3}', "\x00"])
def test_a_half_written_last_line_is_left_out_and_overwritten(run, tail):
    for epoch in (1, 2):
        run.append_metrics({"epoch": epoch})
    with run.metrics_path.open("a") as file:
        file.write(tail)
    assert [row["epoch"] for row in read_metrics(run.path)] == [1, 2]
    run.append_metrics({"epoch": 3, "again": 1})
    assert [row["epoch"] for row in read_metrics(run.path)] == [1, 2, 3]


def test_a_first_line_half_written_is_dropped(run):
    run.metrics_path.write_text('{"epo')
    assert read_metrics(run.path) == []
    run.append_metrics({"epoch": 1})
    assert read_metrics(run.path) == [{"epoch": 1}]


def test_a_damaged_line_in_the_middle_is_named(run):
    run.metrics_path.write_text('{"epoch": 1}\n{"epo\n{"epoch": 3}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl, line 2 is not JSON"):
        read_metrics(run.path)


def test_truncating_keeps_rows_up_to_the_epoch_byte_for_byte(run):
    for epoch in range(1, 6):
        run.append_metrics({"epoch": epoch, "reward": epoch / 3})
    before = run.metrics_path.read_bytes().splitlines(keepends=True)
    with run.metrics_path.open("a") as file:
        file.write('{"epoch": 6, "re')
    assert run.restore_metrics(None, after_epoch=3) is None
    assert run.metrics_path.read_bytes() == b"".join(before[:3])


def test_reading_metrics_of_no_run_is_an_error(tmp_path):
    with pytest.raises(RunError, match="is it a run folder"):
        read_metrics(tmp_path)


def test_pictures_appear_complete(run):
    path = run.save_picture(Image.new("RGB", (4, 4)), "epoch_000001")
    assert path == run.path / "pictures" / "epoch_000001.png"
    assert Image.open(path).size == (4, 4)
    assert [p.name for p in run.pictures.iterdir()] == ["epoch_000001.png"]


def test_git_state_knows_commit_and_changes(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert git_state(tmp_path) is None
    git("init")
    assert git_state(tmp_path) is None
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "first")
    state = git_state(tmp_path)
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "file").write_text("b")
    assert git_state(tmp_path)["dirty"] is True


def test_a_mac_trains_on_its_cpu_unless_told_otherwise(monkeypatch):
    asked = []

    class Joined:
        distributed_type, process_index, num_processes, device = None, 0, 1, "cpu"

        def __init__(self, *, cpu, mixed_precision):
            asked.append(cpu)

    monkeypatch.setattr("trainers.parallel.processes.Accelerator", Joined)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    Processes(), Processes(device="cuda:0")
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    Processes(), Processes(device="cpu")
    assert asked == [True, False, False, True]
