"""Two gloo processes train as one: whole or split networks, uneven shares, checkpoints that go on elsewhere."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from tests.trainers.loop_helpers import weights
from tests.trainers.parity_of_strategies import adapter_options, compare, initial, prepare, run
from tests.trainers.sharded_families import compare_sharded, train_qwen
from tests.trainers.world import all_succeed, command

ROUNDING = {"grad_norm": 1e-3, "logged": 1e-3, "weights": 1e-2, "ema": 1e-2}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("scaling"))


@pytest.fixture(scope="module")
def one(config: Path) -> Path:
    return run(config, "one")


@pytest.fixture(scope="module")
def split(config: Path) -> Path:
    return run(config, "split", "--distributed.strategy", "fsdp", count=2)


@pytest.fixture(scope="module")
def one_full(config: Path) -> Path:
    return run(config, "one-full", *adapter_options("full"))


def assert_same(first: Path, second: Path, start: dict[str, torch.Tensor]) -> None:
    parity = compare(first, second, start)
    assert all(getattr(parity, name) < bound for name, bound in ROUNDING.items()), parity


def test_three_groups_on_two_processes_train_as_on_one(config: Path, one: Path) -> None:
    assert_same(one, run(config, "pair", count=2), initial(config, "lora"))


def test_a_lora_on_a_split_network_trains_as_on_a_whole_one(config: Path, one: Path, split: Path) -> None:
    assert_same(one, split, initial(config, "lora"))


@pytest.mark.parametrize("strategy", ["fsdp", "zero2"])
def test_all_weights_of_a_split_network_train_as_those_of_a_whole_one(
    config: Path, one_full: Path, strategy: str
) -> None:
    pair = run(config, strategy, *adapter_options("full"), "--distributed.strategy", strategy, count=2)
    assert_same(one_full, pair, initial(config, "full"))
    exported = UNet2DConditionModel.from_pretrained(pair / "lora" / "unet")
    averages = weights(pair, "ema")
    assert all(torch.equal(value, averages[f"ema.{name}"]) for name, value in exported.named_parameters())


def test_the_lora_of_a_split_network_is_exported_whole(config: Path, split: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(config.parent / "model", safety_checker=None)
    pipeline.load_lora_weights(split / "lora")
    ours, theirs = weights(split, "ema"), dict(pipeline.unet.named_parameters())
    loaded = [theirs[name.removeprefix("ema.").replace(".default.", ".default_0.")] for name in ours]
    assert all(torch.equal(a, b) for a, b in zip(ours.values(), loaded, strict=True))


@pytest.mark.parametrize(
    ("source", "count", "strategy"),
    [("one", 2, "ddp"), ("one", 2, "fsdp"), ("split", 1, "fsdp"), ("split", 2, "ddp")],
    ids=lambda value: str(value),
)
def test_a_run_goes_on_with_another_number_of_processes_or_strategy(
    config: Path, one: Path, split: Path, source: str, count: int, strategy: str, tmp_path: Path
) -> None:
    moved = tmp_path / "runs" / "moved"
    shutil.copytree({"one": one, "split": split}[source], moved)
    arguments = ["train", "--resume", str(moved), "--checkpoint", "epoch_000001", "--distributed.strategy", strategy]
    all_succeed(command, arguments, count=count, log=tmp_path / "log")
    assert_same(one, moved, initial(config, "lora"))


def test_the_same_processes_and_strategy_resume_a_split_network_bit_exactly(split: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(split, again)
    arguments = ["train", "--resume", str(again), "--checkpoint", "epoch_000001"]
    all_succeed(command, arguments, count=2, log=tmp_path / "log")
    first, second = weights(split, "weights", "optimizer", "ema"), weights(again, "weights", "optimizer", "ema")
    assert all(torch.equal(first[name], second[name]) for name in first)


FAMILIES = ("sd1", "sdxl", "sd3", "flux", "flux2", "pixart", "sana", "qwen", "z-image", "wan")


def test_splitting_changes_no_family_beyond_rounding(tmp_path: Path) -> None:
    output = tmp_path / "errors.json"
    all_succeed(compare_sharded, FAMILIES, output, count=2, log=tmp_path / "log")
    errors = json.loads(output.read_text())
    assert len(errors) == 2 * len(FAMILIES)
    for name, error in errors.items():
        assert error["log_prob"] < 1e-3, (name, error)
        assert error["gradient"] < 1e-4, (name, error)
        assert error["split"] > 0, (name, error)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_weights_that_no_loss_reaches_do_not_hang_two_processes(strategy: str, tmp_path: Path) -> None:
    for count in (1, 2):
        all_succeed(train_qwen, tmp_path, f"p{count}", strategy, count=count, log=tmp_path / f"log{count}")
    first, second = weights(tmp_path / "p1", "weights"), weights(tmp_path / "p2", "weights")
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-5
