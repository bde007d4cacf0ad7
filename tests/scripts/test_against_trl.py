"""The comparison with TRL, with a stand-in for its worker, which needs an environment of its own."""

import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import against_trl
from benchmarks.against_trl import CASES, CHANNELS, Case, Work, compare, environment, epoch, worker

STAND_IN = """
import json, sys
print("a library's word")
for line in sys.stdin:
    print(json.dumps({"cpu": 4.0, "wall": 2.0}), flush=True)
"""


def test_both_sides_of_a_case_have_the_same_images_steps_and_guidance() -> None:
    for case in CASES.values():
        one, other = asdict(case.trl), asdict(case.ours)
        assert {key: one[key] for key in ("images", "steps", "guidance")} == {
            key: other[key] for key in ("images", "steps", "guidance")
        }
        assert case.network in CHANNELS
        assert all(work.images % work.sample_batch == work.images % work.train_batch == 0 for work in (case.trl,))


def test_our_epochs_are_measured_beside_those_of_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "trl_epochs.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(against_trl, "TRL_WORKER", script)
    work = Work(images=4, steps=2, sample_batch=4)
    row = compare(Case(network="small", trl=work, ours=work), Path(sys.executable), tmp_path, rounds=1)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    ours, ratio = (float(cells[column].split()[0]) for column in (5, 6))
    assert cells[1:5] == ["4", "4 / 8", "4 / 8", "4 (4 to 4)"]
    assert ours > 0
    assert ratio == pytest.approx(4 / ours, rel=0.02)


def test_a_worker_that_ends_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "input(); raise SystemExit(3)"]
    with worker(command) as process, pytest.raises(RuntimeError, match="ended with status 3"):
        epoch(process)


def test_an_environment_that_is_there_is_not_installed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "installed").touch()
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("installed again"))
    assert environment(tmp_path) == tmp_path / "bin" / "python"
