"""A run that goes on is told of rewards that are not what it began with, and of nothing else."""

import json
from pathlib import Path

import pytest

from rewards import RewardTerm, WeightedSum, loading
from trainers.parallel.processes import Processes
from trainers.run_folder.records import write_record
from trainers.run_folder.reward_record import REWARDS, record_rewards
from trainers.tracking.progress import Progress

CODE = "def mine(images, prompts, metadata):\n    return images.{how}(dim=(1, 2, 3))\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CODE.format(how="mean"))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def record(run: Path, file: Path, capfd: pytest.CaptureFixture) -> str:
    loading._files.clear()
    reward = WeightedSum([RewardTerm(name="brightness"), RewardTerm(name=f"{file}:mine")])
    record_rewards(run, reward, None, Processes(device="cpu"), Progress(enabled=True))
    captured = capfd.readouterr()
    return captured.err + captured.out


def test_what_stays_the_same_or_is_only_moved_is_not_mentioned(run: Path, file: Path, capfd) -> None:
    record(run, file, capfd)
    moved = file.with_name("elsewhere.py")
    moved.write_text(f'"""Moved."""\nimport math\n{CODE.format(how="mean")}')
    assert "warning" not in record(run, file, capfd) + record(run, moved, capfd)


def test_code_that_changed_is_warned_of_and_kept(run: Path, file: Path, capfd) -> None:
    record(run, file, capfd)
    file.write_text(CODE.format(how="amax"))
    said = record(run, file, capfd)
    assert "reward 'mine' is not what the run began with" in said and "brightness" not in said
    assert [entry["name"] for entry in json.loads((run / REWARDS).read_text())["earlier"]] == ["mine"]


def test_hashes_of_an_earlier_form_are_not_compared(run: Path, file: Path, capfd) -> None:
    record(run, file, capfd)
    saved = json.loads((run / REWARDS).read_text())
    for entry in saved["rewards"]:
        del entry["form"]
        entry["hash"] = "0" * 64
    write_record(run, REWARDS, saved)
    said = record(run, file, capfd)
    assert "reward 'mine' was recorded by an earlier version of ddpo" in said and "brightness" not in said
    assert "warning" not in record(run, file, capfd)
