"""A run, its model, rewards and prompts may lie elsewhere when it goes on; hashes say whether they are the same."""

import shutil
from pathlib import Path

import pytest

from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import write_config
from trainers.cli import main
from trainers.config.io import ConfigError, load_config, to_yaml
from trainers.config.locations import absolute, moved, placeless
from trainers.loop import resume
from trainers.run_folder.folder import read_metrics

REWARD = "def bright(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny-sd"
    tiny_stable_diffusion().save_pretrained(folder, safe_serialization=True)
    return folder


def test_a_run_goes_on_in_another_folder_with_all_its_files_elsewhere(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    monkeypatch.chdir(home)
    shutil.copytree(model, "model")
    Path("mine.py").write_text(REWARD)
    write_config(home, Path("model"))
    keys = ["--epochs", "1", "--evaluation.ode", "false", "--run.name", "a", "--run.output_dir", "runs"]
    keys += ["--prompts.source", "prompts.txt", "--rewards", "[{name: 'mine.py:bright', weight: 2}]"]
    assert main(["train", "tiny.yaml", *keys]) == 0
    saved = load_config("runs/a/config.yaml")
    assert (saved.model.path, saved.prompts.source) == (str(home / "model"), str(home / "prompts.txt"))
    assert saved.rewards[0].name == f"{home}/mine.py:bright"
    monkeypatch.chdir(tmp_path)
    resume(home / "runs" / "a", ["--epochs", "2"])

    home.rename(away)
    run = tmp_path / "b"
    (away / "runs" / "a").rename(run)
    places = {
        "model.path": away / "model",
        "prompts.source": "away/prompts.txt",
        "rewards.0.name": "away/mine.py:bright",
    }
    arguments = [text for key, place in places.items() for text in (f"--{key}", str(place))]
    assert main(["train", "--resume", str(run), "--epochs", "3"]) == 2
    assert "; name where it is now with --model.path" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--epochs", "3", "--run.output_dir", str(tmp_path), *arguments]) == 0
    assert "warning" not in capsys.readouterr().err
    assert [row["epoch"] for row in read_metrics(run)] == [1, 2, 3]
    now = load_config(run / "config.yaml")
    assert (now.model.path, now.rewards[0].weight) == (str(away / "model"), 2)
    (away / "model").rename(tmp_path / "model")
    assert main(["evaluate", str(run), "--model.path", "model"]) == 0
    assert main(["evaluate", str(run), "--epochs.x", "3"]) == 2
    with pytest.raises(ConfigError, match="stays in its folder .* or move the folder and name it as --resume"):
        resume(run, ["--run.output_dir", str(away)])


def test_another_reward_is_no_other_place(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("rewards: [{name: 'a/my.py:f', options: {path: a/fitted}}]\n")
    saved = load_config(tmp_path / "c.yaml")
    (tmp_path / "fitted").mkdir()
    there = load_config(
        tmp_path / "c.yaml", ["--rewards", f"[{{name: 'b/my.py:f', options: {{path: {tmp_path}/fitted}}}}]"]
    )
    assert moved(saved, there) == there
    for other in ("a/my.py:g", "brightness"):
        wanted = load_config(tmp_path / "c.yaml", ["--rewards", f"[{{name: '{other}'}}]"])
        assert moved(saved, wanted).rewards[0].name == "a/my.py:f"
    wanted = load_config(tmp_path / "c.yaml", ["--prompts.source", "animals"])
    assert moved(saved, wanted).prompts.source == "shapes"
    assert absolute(saved) == saved, "what does not exist stays as it is written"
    assert placeless({"path": "/a/fitted", "head": "owner/name"}) == {"path": "fitted", "head": "owner/name"}
    assert to_yaml(absolute(there)) == to_yaml(there)
