"""The front against brute force, on evaluations written for the test, and a sweep of real tiny runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from scripts import plot_tradeoff
from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import write_config
from trainers.analysis.pareto import default_measures, non_dominated, read_course, report
from trainers.cli import main
from trainers.evaluation.evaluator import Evaluation
from trainers.run_folder.folder import RunError, RunFolder, read_metrics

CONFIG = "rewards: [{name: brightness}, {name: 'my.py:redness'}]\n"


def write_run(folder: Path, name: str, *points: tuple[float, float]) -> Path:
    run = RunFolder.create(folder, name, CONFIG)
    for epoch, (x, y) in enumerate(points):
        values = {key: torch.tensor([mean - 0.1, mean + 0.1]) for key, mean in (("brightness", x), ("redness", y))}
        evaluation = Evaluation(
            values={**values, "kl (nats)": torch.full((2,), float(epoch))},
            images=torch.zeros(2, 3, 2, 2, dtype=torch.uint8), prompts=("a", "b"),
        )  # fmt: skip
        evaluation.save(run.evaluation(epoch))
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
    from rewards import RewardTerm
    from trainers.config import Config

    with pytest.raises(ValueError, match="only brightness; name them by --x and --y"):
        default_measures(Config(rewards=(RewardTerm(name="brightness"),)))


def test_the_command_sweeps_a_weight_and_keeps_finished_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tmp_path / "tiny-sd"
    tiny_stable_diffusion().save_pretrained(model, safe_serialization=True)
    config, out = write_config(tmp_path, model), tmp_path / "front.png"
    command = ["pareto", "--sweep", str(config), "--weights", "brightness=2", "--out", str(out), "--epochs", "1",
               "--rewards.1.name", "redness", "--evaluation.ode", "false"]  # fmt: skip
    assert main(command) == 0
    runs = [run for run in (tmp_path / "runs").iterdir() if run.is_dir()]
    assert [run.name for run in runs] == ["tiny-brightness-2"]
    stamps = [(run / "summary.json").stat().st_mtime_ns for run in runs]
    assert main(command) == 0
    assert [(run / "summary.json").stat().st_mtime_ns for run in runs] == stamps
    assert np.isfinite(json.loads(out.with_suffix(".json").read_text())["runs"]["tiny-brightness-2"][1]["y"]["mean"])
    assert "front" in capsys.readouterr().out
    assert main([*command, "--epochs", "2"]) == 0
    assert [row["epoch"] for row in read_metrics(runs[0])] == [1, 2], "more epochs are a continuation"
    assert main([*command, "--sampler.num_steps", "2"]) == 2
    assert "sampler.num_steps (saved 3, now 2)" in capsys.readouterr().err
    assert main(["pareto", "--sweep", str(config), "--weights", "redness=1"]) == 2
    assert "no reward 'redness'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("front.xyz", "--out must end in .png, .pdf, .svg, got front.xyz"),
        ("front", "--out must end in .png, .pdf, .svg, got front"),
        ("file/front.png", "file is a file; choose another folder"),
        ("folder.png", "--out: folder.png is a folder; name a file"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_the_sweep(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    out: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("folder.png").mkdir()
    config = write_config(tmp_path, tmp_path)
    assert main(["pareto", "--sweep", str(config), "--weights", "brightness=1", "--out", out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith(message)
    assert not (tmp_path / "runs").exists()


def test_the_trade_off_has_a_colour_and_a_label_for_each_weight_of_the_kl(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, name, (0.5, 0.5), (0.6, y)) for name, y in (("a", 0.6), ("b", 0.7), ("c", 0.8))]
    for run, alpha in zip(runs, (0.1, 0.0, 0.1), strict=True):
        RunFolder(path=run).save_config(f"{CONFIG}kl: {{alpha: {alpha}}}\n")
    (axes,) = plot_tradeoff.draw(runs, "brightness", "redness").axes
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2]
    assert [line.get_ydata()[-1] for line in lines] == pytest.approx([0.6, 0.7, 0.8])
    assert lines[0].get_color() == lines[2].get_color() != lines[1].get_color()
    assert sorted(text.get_text() for text in axes.get_legend().get_texts()) == ["alpha 0", "alpha 0.1"]
