"""A run whose files were damaged goes on with the same result, or is refused by name; so is one of another model."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import write_config
from trainers.cli import main
from trainers.config.io import load_config, to_yaml
from trainers.loop import resume, train_from_config
from trainers.run_folder.folder import RunError
from trainers.run_folder.model_record import hash_files

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a configuration and the run of it, of two epochs, evaluated at 0, 1 and 2."""
    folder = tmp_path_factory.mktemp("begun")
    tiny_stable_diffusion().save_pretrained(folder / "model", safe_serialization=True)
    keys = ["--evaluation.ode", "false", "--evaluation.every_epochs", "1", "--epochs", "2", "--run.name", "run"]
    config = load_config(write_config(folder, folder / "model"), keys)
    train_from_config(config, config_yaml=to_yaml(config, full=True))
    return folder


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the run; the model is put back afterwards."""
    shutil.copytree(begun / "model", tmp_path / "model")
    yield shutil.copytree(begun / "runs" / "run", tmp_path / "run")
    shutil.rmtree(begun / "model")
    shutil.copytree(tmp_path / "model", begun / "model")


def flip(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def contents(run: Path) -> dict[str, bytes]:
    files = (path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(("epoch", "how"), [(0, "flip"), (0, "cut"), (0, "gone"), (2, "flip")])
def test_an_evaluation_that_can_be_made_again_is(
    run: Path, epoch: int, how: str, capsys: pytest.CaptureFixture
) -> None:
    file = run / "evaluations" / f"epoch_{epoch:06d}.safetensors"
    before = file.read_bytes()
    {"flip": flip, "cut": lambda path: path.write_bytes(before[:900]), "gone": Path.unlink}[how](file)
    resume(run)
    assert file.read_bytes() == before
    assert f"warning: {file} " in capsys.readouterr().err


def test_an_evaluation_that_cannot_is_refused_and_put_aside_when_accepted(
    run: Path, capsys: pytest.CaptureFixture
) -> None:
    file = run / "evaluations" / "epoch_000001.safetensors"
    flip(file)
    damaged, before = file.read_bytes(), contents(run)
    assert main(["train", "--resume", str(run), "--epochs", "3"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "other contents, and cannot be made again: put it back, or go on without it" in line
    assert contents(run) == before
    assert main(["train", "--resume", str(run), "--epochs", "3", "--accept", "evaluations"]) == 0
    assert file.with_name(f"{file.name}.damaged").read_bytes() == damaged
    assert not file.exists()


@pytest.mark.parametrize("name", ["rewards.json", "prompts.json", "model.json", "environment.json", "metrics.jsonl"])
def test_a_damaged_record_is_put_back_and_said(run: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    before = (run / name).read_bytes()
    flip(run / name)
    resume(run)
    assert f"{run / name} " in capsys.readouterr().err
    if name == "environment.json":
        begun = json.loads(before)
        assert {key: json.loads((run / name).read_text())[key] for key in begun} == begun
    else:
        assert (run / name).read_bytes() == before


def test_without_a_ledger_the_run_goes_on_and_notes_its_files_anew(run: Path, capsys: pytest.CaptureFixture) -> None:
    noted = json.loads((run / "files.json").read_text())["files"]
    (run / "files.json").write_text("{")
    resume(run)
    assert "files.json is damaged: files of the run were not compared" in capsys.readouterr().err
    assert json.loads((run / "files.json").read_text())["files"].keys() == noted.keys()


def test_another_pretrained_model_is_refused_until_it_is_accepted(
    begun: Path, run: Path, capsys: pytest.CaptureFixture
) -> None:
    file = begun / "model" / WEIGHTS
    save_file({name: 1.03 * value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    before = contents(run)
    message = "the pretrained model is not what the run began with: unet/diffusion_pytorch_model.safetensors"
    for arguments in (["train", "--resume"], ["evaluate"], ["sample", "--prompt", "a cat"]):
        assert main([*arguments, str(run)]) == 2
        assert message in capsys.readouterr().err
    assert contents(run) == before
    with pytest.raises(RunError, match=message):
        resume(run)
    assert main(["sample", str(run), "--prompt", "a cat", "--num-images", "1", "--accept", "model"]) == 0
    resume(run, accept=["model"])
    assert "warning: the model is not what the run began with" in capsys.readouterr().err
    assert len(json.loads((run / "model.json").read_text())["earlier"]) == 1
    resume(run)


def test_only_the_weights_that_are_loaded_count(begun: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(begun / "model", tmp_path / "model")
    parts = ["unet", "vae", "text_encoder", "tokenizer", "scheduler"]
    before = hash_files(folder, parts)
    assert {name.partition("/")[0] for name in before} == {*parts, "model_index.json"}
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors", "model.onnx"):
        (folder / "unet" / name).write_bytes(b"x")
    assert hash_files(folder, parts) == before
    assert hash_files(folder, parts, variant="fp16").keys() - before.keys() == {
        "unet/diffusion_pytorch_model.fp16.safetensors"
    }
