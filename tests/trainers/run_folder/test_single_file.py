"""A run of a single file of weights, from its start to a pipeline of its own, without a network."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from tests.ddpo.single_file import write_single_file
from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import write_config
from trainers.cli import main
from trainers.config.io import load_config
from trainers.run_folder.folder import read_metrics


def test_a_single_file_is_trained_resumed_elsewhere_and_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline = tiny_stable_diffusion()
    pipeline.save_pretrained("settings")
    for weights in Path("settings").rglob("*.safetensors"):
        weights.unlink()
    write_single_file(pipeline, Path("tiny.safetensors"))
    write_config(tmp_path, Path("tiny.safetensors"))
    keys = ["--epochs", "1", "--evaluation.ode", "false", "--run.name", "a", "--run.output_dir", "runs"]
    assert main(["train", "tiny.yaml", *keys, "--model.config", "./nowhere"]) == 2
    assert "error: model.config: there is no model_index.json in" in capsys.readouterr().err
    assert main(["train", "tiny.yaml", *keys, "--model.config", "settings"]) == 0
    saved = load_config("runs/a/config.yaml").model
    assert (saved.path, saved.config) == (str(tmp_path / "tiny.safetensors"), str(tmp_path / "settings"))
    card = Path("runs/a/lora/README.md").read_text()
    assert f'StableDiffusionPipeline.from_single_file("{saved.path}", config="{saved.config}")' in card

    Path("moved").mkdir()
    shutil.move("tiny.safetensors", "moved"), shutil.move("settings", "moved")
    places = ["--model.path", "moved/tiny.safetensors", "--model.config", "moved/settings"]
    assert main(["train", "--resume", "runs/a", "--epochs", "2", *places]) == 0
    assert [row["epoch"] for row in read_metrics(Path("runs/a"))] == [1, 2]
    assert main(["export", "runs/a", "--format", "merged", "--output", "merged"]) == 0
    merged, trained = DiffusionPipeline.from_pretrained("merged").unet.state_dict(), pipeline.unet.state_dict()
    assert any(not torch.equal(merged[name], trained[name]) for name in trained)

    capsys.readouterr()
    write_single_file(tiny_stable_diffusion(seed=1), Path("moved/tiny.safetensors"))
    assert main(["train", "--resume", "runs/a", "--epochs", "3"]) == 2
    assert "or take this one with --accept model" in capsys.readouterr().err
