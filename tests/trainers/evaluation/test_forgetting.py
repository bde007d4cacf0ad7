"""Evaluations of what is forgotten, through the whole trainer."""

from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import write_config
from tests.trainers.world import all_succeed, command
from trainers.config.io import ConfigError, load_config
from trainers.evaluation.evaluator import Evaluation
from trainers.evaluation.spread import spread_of
from trainers.run_folder.folder import RunFolder

KEYS = ["--evaluation.spread", "colour", "--evaluation.forgetting", "3", "--evaluation.every_epochs", "1"]
NAMES = ("vendi", "vendi_within", "within/mean", "within/nearest", "across/mean", "across/nearest")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-sd"
    tiny_stable_diffusion().save_pretrained(folder)
    return write_config(tmp_path, folder)


def evaluations(run: Path, epochs: int) -> list[Evaluation]:
    return [Evaluation.load(RunFolder.open(run).evaluation(epoch), ["a", "a", "b", "b"]) for epoch in range(epochs + 1)]


def test_what_is_forgotten_is_measured_image_by_image_the_same_on_two_processes(config: Path, tmp_path: Path) -> None:
    found = {}
    for count in (1, 2):
        arguments = ["train", str(config), "--run.name", f"p{count}", "--epochs", "2", *KEYS]
        arguments += ["--optimizer.learning_rate", "3e-2"]
        all_succeed(command, arguments, count=count, log=tmp_path / f"p{count}.log")
        found[count] = evaluations(tmp_path / "runs" / f"p{count}", 2)
    before, _, after = (one.values["forgetting/denoising"] for one in found[1])
    assert before.shape == (4,) and not torch.equal(before, after)
    torch.testing.assert_close(found[2][0].values["forgetting/denoising"], before)
    measures = found[1][0].summary()
    assert all(f"spread/{name}" in measures for name in NAMES)
    assert 1 <= measures["spread/vendi_within"].mean <= 2 and 1 <= measures["spread/vendi"].mean <= 4
    assert all(measures[f"spread/{name}"].error is not None for name in NAMES)


def test_equal_pictures_have_no_spread_and_many_different_ones_much() -> None:
    spread = spread_of("colour", torch.device("cpu"))
    assert spread is not None
    random = torch.Generator().manual_seed(0)
    same = spread(torch.rand(1, 3, 16, 16, generator=random).expand(8, -1, -1, -1), 4)
    other = spread(torch.rand(8, 3, 16, 16, generator=random), 4)
    assert float(same["spread/vendi"].mean()) == pytest.approx(1, abs=1e-4)
    assert float(same["spread/within/mean"].max()) < 1e-6
    assert float(other["spread/vendi"].mean()) > 5 and float(other["spread/across/nearest"].min()) > 0.05


def test_an_unknown_embedding_is_refused_before_weights_load(config: Path) -> None:
    with pytest.raises(ConfigError, match="evaluation.spread: must be colour, imagenet"):
        load_config(config, ["--evaluation.spread", "colours"])
