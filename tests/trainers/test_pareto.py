"""The front against brute force, on evaluations written for the test, and a sweep of real tiny runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import write_config
from trainers.cli import main
from trainers.evaluation import Evaluation
from trainers.pareto import default_measures, non_dominated, read_course, report
from trainers.run import RunError, RunFolder

CONFIG = "rewards: [{name: brightness}, {name: 'my.py:redness'}]\n"


def write_run(folder: Path, name: str, *points: tuple[float, float]) -> Path:
    run = RunFolder.create(folder, name, CONFIG)
    for epoch, (x, y) in enumerate(points):
        values = {key: torch.tensor([mean - 0.1, mean + 0.1]) for key, mean in (("brightness", x), ("redness", y))}
        evaluation = Evaluation(
            values={**values, "kl (nats)": torch.full((2,), float(epoch))},
            images=torch.zeros(2, 3, 2, 2, dtype=torch.uint8), prompts=("a", "b"),
        )  # fmt: skip
        evaluation.save(run.path / "evaluations", f"epoch_{epoch:06d}")
    return run.path


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=9))
def test_the_front_is_what_no_point_dominates(points):
    expected = [
        not any(all(a >= b for a, b in zip(q, p, strict=True)) and q != p for q in points) for p in points
    ]  # fmt: skip
    assert non_dominated(points).tolist() == expected


def test_the_report_marks_the_front_and_writes_figure_and_numbers(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path, "left", (0.5, 0.5), (0.4, 0.9)),
        write_run(tmp_path, "right", (0.5, 0.5), (0.6, 0.55), (0.9, 0.4)),
        write_run(tmp_path, "worse", (0.5, 0.5), (0.3, 0.45)),
    ]
    text = report(runs, x=None, y=None, out=tmp_path / "figures" / "front.png")
    record = json.loads((tmp_path / "figures" / "front.json").read_text())
    assert record["front"] == ["pretrained", "left", "right"]
    assert (record["x"], record["y"]) == ("brightness", "redness")
    assert [point["epoch"] for point in record["runs"]["right"]] == [0, 1, 2]
    assert record["runs"]["right"][2]["x"]["mean"] == pytest.approx(0.9)
    assert record["runs"]["right"][2]["x"]["error"] == pytest.approx(0.0, abs=1e-6), "every image changed alike"
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert lines["left"].endswith("front") and not lines["worse"].endswith("front")
    assert (tmp_path / "figures" / "front.png").stat().st_size > 10_000


def test_errors_are_of_the_paired_change_and_runs_of_other_evaluations_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, "one", (0.5, 0.5), (0.6, 0.6))
    file = run / "evaluations" / "epoch_000001.safetensors"
    tensors = load_file(file)
    tensors["value.brightness"] = torch.tensor([0.4, 1.0])  # changes of 0 and 0.4
    save_file(tensors, file)
    assert read_course(run, "brightness", "redness").points[1].x.error == pytest.approx(0.2, rel=1e-5)
    other = write_run(tmp_path, "other", (0.7, 0.5), (0.8, 0.6))
    assert "first evaluations differ" in report([run, other], x=None, y=None, out=tmp_path / "front.png")


def test_kl_counts_as_better_when_it_is_small(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path, "far", (0.5, 0.5), (0.6, 0.5), (0.6, 0.5)),
        write_run(tmp_path, "near", (0.5, 0.5), (0.7, 0.5)),
    ]
    report(runs, x="kl", y="brightness", out=tmp_path / "front.png")
    assert json.loads((tmp_path / "front.json").read_text())["front"] == ["pretrained", "near"]


def test_missing_measures_and_runs_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path, "one", (0.1, 0.2))
    with pytest.raises(RunError, match="has no measure 'shapes'; it has brightness, kl"):
        report([run], x="shapes", y="redness", out=tmp_path / "x.png")
    with pytest.raises(ValueError, match="no runs given"):
        report([], x=None, y=None, out=tmp_path / "x.png")
    from trainers.config import Config, RewardTerm

    with pytest.raises(ValueError, match="only brightness; name them by --x and --y"):
        default_measures(Config(rewards=(RewardTerm(name="brightness"),)))


def test_the_command_sweeps_a_weight_and_keeps_finished_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tmp_path / "tiny-sd"
    tiny_stable_diffusion().save_pretrained(model, safe_serialization=True)
    config, out = write_config(tmp_path, model), tmp_path / "front.png"
    command = ["pareto", "--sweep", str(config), "--weights", "brightness=2", "--out", str(out), "--epochs", "1",
               "--rewards.1.name", "redness", "--evaluation.ode", "false"]  # fmt: skip
    assert main(command) == 0
    runs = sorted((tmp_path / "runs").iterdir())
    assert [run.name for run in runs] == ["tiny-brightness-2"]
    stamps = [(run / "summary.json").stat().st_mtime_ns for run in runs]
    assert main(command) == 0
    assert [(run / "summary.json").stat().st_mtime_ns for run in runs] == stamps
    assert np.isfinite(json.loads(out.with_suffix(".json").read_text())["runs"]["tiny-brightness-2"][1]["y"]["mean"])
    assert "front" in capsys.readouterr().out
    assert main(["pareto", "--sweep", str(config), "--weights", "redness=1"]) == 2
    assert "no reward 'redness'" in capsys.readouterr().err
