"""`ddpo runs`: what is listed, and that listing takes no lock and imports nothing heavy."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainers.loop_helpers import environment
from trainers.run_folder.listing import as_table, is_held, list_runs


def make_run(folder: Path, *, rewards=(1.0, 2.0), epochs=4, exported=False) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"epochs: {epochs}\n")
    rows = [
        {"epoch": i + 1, "reward/mean": reward, "kl/path_nats": 0.5 * (i + 1), "time/total_seconds": 60.0 * (i + 1)}
        for i, reward in enumerate(rewards)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if exported:
        (folder / "lora").mkdir()
    return folder


def test_a_run_is_stopped_until_its_weights_are_exported(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", exported=True)
    a, b = sorted(list_runs(tmp_path), key=lambda run: run.name)
    assert (a.state, b.state) == ("stopped", "finished")
    assert (a.epochs, a.of, a.reward, a.kl, a.minutes) == (2, 4, (1.0, 2.0), 1.0, 2.0)
    assert a.bytes == sum(path.stat().st_size for path in (tmp_path / "a").iterdir())


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="the system lists no locks")
def test_a_run_whose_lock_is_held_runs_and_asking_takes_no_lock(tmp_path):
    run = make_run(tmp_path / "a")
    with (run / ".lock").open("w") as file:
        assert not is_held(run / ".lock")
        fcntl.flock(file, fcntl.LOCK_EX)
        assert list_runs(tmp_path)[0].state == "running"
        fcntl.flock(file, fcntl.LOCK_UN)
    assert list_runs(tmp_path)[0].state == "stopped"


def test_a_damaged_run_is_listed_with_what_can_be_read(tmp_path):
    run = make_run(tmp_path / "a")
    (run / "config.yaml").write_text("epochs: [\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "rew')
    (found,) = list_runs(tmp_path)
    assert (found.state, found.epochs, found.of) == ("damaged", 2, None)
    assert "2/?" in as_table([found])


def test_listing_imports_nothing_heavy(tmp_path):
    make_run(tmp_path / "a")
    code = (
        "import sys; from trainers.cli import main; status = main(['runs', sys.argv[1]]);"
        "assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2].split()[:5] == ["a", "stopped", "2/4", "1", "->"]
