"""Rewards outside the training process: the same run to the last bit, and nothing lost when the other side fails."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rewards import RewardError
from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import ROOT, environment, reproducible, weights, write_config
from trainers.config.errors import ConfigError
from trainers.config.groups import RewardProcessConfig
from trainers.config.io import load_config, to_yaml
from trainers.loop import resume, train_from_config
from trainers.run_folder.folder import read_metrics
from trainers.scoring.reward_processes import end, launch

GROUPS = ("weights", "optimizer", "ema")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny-sd"
    tiny_stable_diffusion().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(write_config(tmp_path_factory.mktemp("run"), model))


def start(config: Path, *overrides: str) -> Path:
    loaded = load_config(config, overrides)
    return train_from_config(loaded, config_yaml=to_yaml(loaded, full=True))


def serve(*names: str, port: int = 0) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "-m", "trainers", "rewards", "serve", *names, "--port", str(port)]
    server = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return server, json.loads(server.stdout.readline())["url"]


def same(run: Path, other: Path) -> bool:
    mine, theirs = weights(run, *GROUPS), weights(other, *GROUPS)
    return mine.keys() == theirs.keys() and all(bool((mine[name] == theirs[name]).all()) for name in mine)


def test_processes_of_their_own_give_the_same_run(model: Path, undisturbed: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, model)
    run = start(config, "--reward_processes.devices", "[cpu, cpu]", "--heldout_rewards", "[{name: redness}]")
    assert same(run, undisturbed)
    judged = [{k: v for k, v in row.items() if k != "evaluation/overoptimised"} for row in reproducible(run)]
    assert judged == reproducible(undisturbed), "but for what held-out rewards add"
    recorded = json.loads((run / "rewards.json").read_text())["rewards"]
    assert [(entry["group"], entry["name"], entry["where"]) for entry in recorded] == [
        ("rewards", "brightness", "reward processes"),
        ("heldout_rewards", "redness", "reward processes"),
    ]
    alone = json.loads((undisturbed / "rewards.json").read_text())["rewards"]
    assert alone[0]["hash"] == recorded[0]["hash"], "identity does not depend on where it is computed"


def test_a_killed_server_stops_the_run_and_resuming_loses_nothing(
    model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    killer = tmp_path / "fragile.py"
    killer.write_text(
        "import os, pathlib, signal\n"
        "from rewards.builtin.color import brightness\n"
        "def fragile(images, prompts, metadata):\n"
        f"    calls = pathlib.Path({str(tmp_path / 'calls')!r})\n"
        "    calls.write_text(calls.read_text() + 'x' if calls.exists() else 'x')\n"
        "    if len(calls.read_text()) == 6:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return brightness(images, prompts, metadata)\n"
    )
    server, url = serve(f"{killer}:fragile")
    options = f"{{url: '{url}', reward: fragile, precision: float32, timeout: 5, max_wait: 1}}"
    config = write_config(tmp_path, model)
    terms = f"[{{name: remote, normalize: std, options: {options}}}]"
    with pytest.raises(RewardError, match=f"{url}: no answer .*gave up after 1 s"):
        start(config, "--rewards", terms, "--run.name", "killed", "--checkpoints.every_epochs", "0")
    assert server.wait() == -signal.SIGKILL
    run = tmp_path / "runs" / "killed"
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"epoch_{len(read_metrics(run)):06d}"]
    server, _ = serve(f"{killer}:fragile", port=int(url.rpartition(":")[2]))
    try:
        resume(run)
    finally:
        server.kill()
        server.wait()
    assert same(run, undisturbed)


def test_another_reward_on_resume_is_a_warning_and_is_recorded(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    reward = tmp_path / "mine.py"
    reward.write_text("def mine(images, prompts, metadata):\n    return images.mean(dim=(1, 2, 3))\n")
    config = write_config(tmp_path, model)
    run = start(config, "--rewards.0.name", f"{reward}:mine", "--epochs", "1")
    before = json.loads((run / "rewards.json").read_text())
    reward.write_text(reward.read_text().replace("images.mean", "images.amax"))
    from rewards import loading

    loading._files.clear()
    resume(run, ["--epochs", "2"])
    assert "reward 'mine' is not what the run began with" in capfd.readouterr().err
    after = json.loads((run / "rewards.json").read_text())
    assert after["earlier"] == before["rewards"]
    assert after["rewards"][0]["hash"] != before["rewards"][0]["hash"]


def test_a_reward_that_cannot_be_loaded_there_is_named_and_nothing_is_left_running(
    capfd: pytest.CaptureFixture,
) -> None:
    with pytest.raises(RewardError, match="reward process on cpu ended with status 2"):
        launch(["brightnes"], RewardProcessConfig(devices=("cpu",)), token="0123456789abcdef")
    assert "did you mean brightness" in capfd.readouterr().err.replace("'", "")


def test_reward_processes_end_when_they_are_told_and_when_they_hang() -> None:
    _, names, children = launch(["brightness"], RewardProcessConfig(devices=("cpu",)), token="0123456789abcdef")
    assert names == {"brightness": "brightness"}
    os.kill(children[0].pid, signal.SIGSTOP)
    end(children)
    assert children[0].returncode == -signal.SIGKILL


def test_a_reward_held_out_with_other_options_is_served_and_reported_under_its_label(
    model: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "class Power:\n    def __init__(self, *, device, of=1):\n        self.of = of\n"
        "    def __call__(self, images, prompts, metadata):\n        return images.mean(dim=(1, 2, 3)) ** self.of\n"
    )
    config = write_config(tmp_path, model)
    held = f"[{{name: '{mine}:Power', options: {{of: 2}}, label: squared}}]"
    terms = ("--rewards.0.name", f"{mine}:Power", "--rewards.0.label", "plain", "--heldout_rewards", held)
    run = start(config, *terms, "--reward_processes.devices", "[cpu]", "--epochs", "1")
    values = load_file(run / "evaluations" / "epoch_000000.safetensors")
    torch.testing.assert_close(values["value.heldout/squared"], values["value.plain"] ** 2)
    assert "reward/plain" in read_metrics(run)[0]
    recorded = json.loads((run / "rewards.json").read_text())["rewards"]
    assert [entry["name"] for entry in recorded] == ["plain", "squared"]


def test_a_reward_named_twice_needs_a_label_whatever_its_options(model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, model)

    def terms(first: str, second: str, label: str = "null") -> str:
        one, two = (f"options: {{reward: {name}}}" for name in (first, second))
        return f"[{{name: remote, {one}}}, {{name: remote, {two}, label: {label}}}]"

    assert len(load_config(config, ["--rewards", terms("ocr", "shapes")]).rewards) == 2
    assert len(load_config(config, ["--rewards", terms("ocr", "ocr", "again")]).rewards) == 2
    for wrong in (terms("ocr", "ocr"), "[{name: rank, options: {reward: a}}, {name: rank, options: {reward: b}}]"):
        with pytest.raises(ConfigError, match="names each reward once, or tells them apart by `label`"):
            load_config(config, ["--rewards", wrong])
