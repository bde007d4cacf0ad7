"""`ddpo export`: a run's weights in each format, read back by that format's own loader."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from safetensors.torch import load_file

from ddpo.loading import SHAPES
from trainers.analysis.conversion import FORMATS
from trainers.cli import main
from trainers.run_folder.checkpoint import load_checkpoint

SMALL = [
    "--epochs=2",
    "--batch.samples_per_epoch=8",
    "--batch.group_size=4",
    "--sampler.num_steps=2",
    "--objective.updates_per_epoch=1",
    "--evaluation.num_prompts=2",
    "--evaluation.images_per_prompt=1",
    "--tracking.trackers=[]",
    "--checkpoints.every_epochs=1",
    "--optimizer.learning_rate=0.05",
    "--adapter.rank=2",
    "--adapter.alpha=5",
    "--checkpoints.keep_last=2",
    "--model.device=cpu",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", "shapes_ppo", *SMALL, f"--run.output_dir={folder}", "--run.name=tiny"]) == 0
    return folder / "tiny"


def exported(run, tmp_path, capsys, *options):
    capsys.readouterr()
    assert main(["export", str(run), "--output", str(tmp_path / "out.safetensors"), *options]) == 0
    path = Path(capsys.readouterr().out.splitlines()[-1])
    assert path == tmp_path / "out.safetensors"
    return path


def output(unet):
    unet.eval()
    x = torch.randn(2, unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(3))
    words = torch.randn(2, 5, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return unet(x, torch.tensor(500), encoder_hidden_states=words).sample


def loaded(format_, path):
    pipeline = DiffusionPipeline.from_pretrained(path if format_ == "merged" else SHAPES)
    if format_ == "peft":
        return PeftModel.from_pretrained(pipeline.unet, path).base_model.model
    if format_ != "merged":
        pipeline.load_lora_weights(str(path))
    return pipeline.unet


def of_checkpoint(run, epoch):
    """The network with the weights of a checkpoint, put together by hand: W + alpha / rank B @ A."""
    saved = load_checkpoint(run / "checkpoints" / f"epoch_{epoch:06d}")[0]["weights"]
    unet = DiffusionPipeline.from_pretrained(SHAPES).unet
    for name in [key for key in saved if ".lora_A." in key]:
        down, up = saved[name], saved[name.replace(".lora_A.", ".lora_B.")]
        weight = unet.get_submodule(name.partition(".lora_A.")[0]).weight
        weight.data += (5 / 2 * up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return unet


@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_is_read_back_as_the_network_that_was_trained(format_, run, tmp_path, capsys):
    stock, trained = output(DiffusionPipeline.from_pretrained(SHAPES).unet), output(of_checkpoint(run, 2))
    read = output(loaded(format_, exported(run, tmp_path, capsys, "--format", format_)))
    assert (trained - stock).abs().max() > 100 * (read - trained).abs().max()
    torch.testing.assert_close(read, trained, atol=1e-4, rtol=0)


def test_an_epoch_and_a_precision_can_be_chosen(run, tmp_path, capsys):
    path = exported(run, tmp_path, capsys, "--format", "kohya", "--epoch", "1", "--dtype", "bf16")
    assert {value.dtype for value in load_file(path).values()} == {torch.bfloat16}
    read, first, last = (output(unet) for unet in (loaded("kohya", path), of_checkpoint(run, 1), of_checkpoint(run, 2)))
    assert (read - first).abs().max() < 0.3 * (read - last).abs().max()


def test_what_exists_already_or_is_not_there_is_refused_before_the_model_loads(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trainers.analysis.conversion.load_policy", None)
    (tmp_path / "there").mkdir()
    assert main(["export", str(run), "--format", "merged", "--output", str(tmp_path / "there")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export", str(run), "--format", "merged", "--epoch", "7"]) == 2
    assert "has no checkpoint of it; there are 1, 2" in capsys.readouterr().err
