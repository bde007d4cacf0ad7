"""What holds weights to the start, through the whole trainer: resumes, processes, files, refusals, plans."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.trainers.loop_helpers import assert_trained_alike, reproducible, start, weights, write_config
from tests.trainers.world import all_succeed, command
from trainers.config.io import ConfigError, load_config
from trainers.loop import resume
from trainers.planning.plan import expected_plan
from trainers.planning.preflight import preflight
from trainers.run_folder.folder import read_metrics

ALL = """\
regularization:
  l2: 0.5
  ewc: {strength: 30, samples: 3, noises: 2}
  denoising: {strength: 0.5, samples: 5, batch_size: 7}
"""
GROUPS = ("weights", "optimizer", "ema")
TERMS = ("l2", "ewc", "denoising")


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path, model, extra=ALL)


def test_a_resume_is_bit_exact_with_all_terms_whether_or_not_what_was_made_once_is_there(config: Path) -> None:
    whole = start(config, "--run.name", "whole")
    parts = start(config, "--run.name", "parts", "--epochs", "1")
    resume(parts, ["--epochs", "2"])
    made = {file: file.read_bytes() for file in (parts / "start").iterdir()}
    assert {file.name for file in made} == {"samples.safetensors", "fisher.safetensors"}
    for file in made:
        file.write_bytes(b"damaged")
    resume(parts, ["--epochs", "3"])
    assert {file: file.read_bytes() for file in made} == made, "made again at the weights of the start"
    first, second = weights(whole, *GROUPS), weights(parts, *GROUPS)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert reproducible(whole) == reproducible(parts)
    for row in read_metrics(whole)[1:]:
        assert all(row[f"regularization/{name}"] > 0 for name in TERMS)
    fisher = load_file(whole / "start" / "fisher.safetensors")
    assert all((value.max() > 0) == ("lora_B" in name) for name, value in fisher.items() if "attn2.to_k" not in name)


def test_two_processes_are_held_as_one_is(config: Path, tmp_path: Path) -> None:
    runs = {}
    for count in (1, 2):
        arguments = ["train", str(config), "--run.name", f"p{count}", "--epochs", "2"]
        all_succeed(command, arguments, count=count, log=tmp_path / f"p{count}.log")
        runs[count] = tmp_path / "runs" / f"p{count}"
    assert_trained_alike(weights(runs[1], "weights"), weights(runs[2], "weights"))
    one, two = (load_file(run / "start" / "fisher.safetensors") for run in runs.values())
    assert all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-9) for name in one)
    for row, other in zip(reproducible(runs[1]), reproducible(runs[2]), strict=True):
        for name in TERMS:
            key = f"regularization/{name}"
            assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-9), key


def test_a_firm_hold_keeps_the_weights_at_their_start(model: Path, tmp_path: Path) -> None:
    config, moved = write_config(tmp_path, model), {}
    for name, overrides in {"free": [], "l2": ["--regularization.l2", "1e4"]}.items():
        run = start(config, "--run.name", name, "--epochs", "3", *overrides)
        moved[name] = float(
            sum(value.square().sum() for key, value in weights(run, "weights").items() if "lora_B" in key)
        )
    assert moved["l2"] < 0.5 * moved["free"]


def test_the_denoising_loss_reads_a_folder_of_captioned_images(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {colour} picture\n")
    config = write_config(tmp_path, model)
    options = ["--regularization.denoising.strength", "0.5", "--regularization.denoising.images", str(folder)]
    preflight(load_config(config, options), num_processes=1)
    run = start(config, "--epochs", "1", *options)
    assert read_metrics(run)[0]["regularization/denoising"] > 0
    assert not (run / "start").exists(), "nothing is sampled"
    (folder / "1.txt").unlink()
    with pytest.raises(ConfigError, match=r"^regularization.denoising.images: .*1\.png has no caption"):
        preflight(load_config(config, options), num_processes=1)
    options[-1] = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="^regularization.denoising.images: there is no folder"):
        preflight(load_config(config, options), num_processes=1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--distributed.strategy", "fsdp"], "distributed.strategy: must be ddp with regularization"),
        (["--model.compile", "true"], "model.compile: must be false with regularization"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(config: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config, overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value).strip()


def test_the_plan_counts_the_rows_of_the_terms(config: Path, model: Path, tmp_path: Path) -> None:
    held = expected_plan(load_config(config), num_processes=1)
    off = ["--regularization.l2", "0", "--regularization.ewc.strength", "0", "--regularization.denoising.strength", "0"]
    free = expected_plan(load_config(config, off), num_processes=1)
    assert held.denoiser_rows_per_epoch - free.denoiser_rows_per_epoch == 7 * held.optimizer_steps_per_epoch
    assert held.start_rows == 5 * 3 + 3 * 2 and free.start_rows == 0
    assert "14 denoising" in held.describe() and "21 once" in held.describe()
    assert "denoising" not in free.describe()
