"""Runs that begin from a LoRA of an earlier run: pictures, KL, resume, and exports."""

import pytest
import torch

from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import start, write_config
from trainers.analysis.conversion import Conversion, convert
from trainers.cli import main
from trainers.config.io import load_config
from trainers.evaluation.evaluator import KL, Evaluation
from trainers.loop import resume
from trainers.run_folder.folder import RunError, RunFolder


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tiny_stable_diffusion().save_pretrained(folder / "model", safe_serialization=True)
    return write_config(folder, folder / "model")


@pytest.fixture(scope="module")
def first(config):
    return start(config, "--run.name", "first", "--epochs", "1", "--optimizer.learning_rate", "0.05")


def evaluated(run, epoch):
    return Evaluation.load(RunFolder(path=run).evaluated(epoch), ())


@pytest.mark.parametrize("reference", ["base", "start"])
def test_a_run_begins_with_the_pictures_that_the_earlier_one_ended_with(config, first, reference):
    name = f"second-{reference}"
    run = start(config, "--run.name", name, "--epochs", "1", "--adapter.init", str(first / "lora"),
                "--adapter.reference", reference)  # fmt: skip
    end, begin = evaluated(first, 1), evaluated(run, 0)
    assert (end.images.int() - begin.images.int()).abs().max() <= 1
    kl = begin.values[KL]
    assert torch.allclose(kl, end.values[KL], rtol=1e-3) if reference == "base" else not kl.any()
    assert load_config(run / "config.yaml").init == str(first / "lora")


def test_a_stacked_run_goes_on_only_on_the_same_lora_and_merges_with_it(config, first, tmp_path):
    lora = tmp_path / "lora"
    lora.mkdir()
    file = lora / "pytorch_lora_weights.safetensors"
    file.write_bytes((first / "lora" / file.name).read_bytes())
    run = start(config, "--run.name", "stacked", "--epochs", "1", "--adapter.init", str(lora),
                "--adapter.reference", "start")  # fmt: skip
    assert "pipe.fuse_lora()" in (run / "lora" / "README.md").read_text()
    merged = convert(run, Conversion(format="merged", output=tmp_path / "merged"))
    again = start(config, "--run.name", "merged", "--epochs", "1", "--model.path", str(merged))
    assert (evaluated(run, 1).images.int() - evaluated(again, 0).images.int()).abs().max() <= 1
    resume(run, ["--epochs", "2"])
    file.write_bytes((run / "lora" / file.name).read_bytes())
    with pytest.raises(RunError, match=r"the pretrained model is not what the run began with: adapter\.init/"):
        resume(run, ["--epochs", "3"])


def test_a_lora_that_is_not_there_is_refused_before_weights_load(config, capsys):
    assert main(["train", str(config), "--adapter.init", "/nowhere/lora"]) == 2
    assert "adapter.init: there is no /nowhere/lora" in capsys.readouterr().err
