"""Checkpoints: exact, complete or absent, and honest about damage."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from trainers.parallel.rng import rng_state, set_rng_state
from trainers.run_folder.checkpoint import (
    CheckpointError,
    checkpoint_epoch,
    checkpoint_path,
    discard_after,
    is_intact,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune,
    save_checkpoint,
)
from trainers.run_folder.ledger import WriteError

TENSORS = {
    "weights": {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.int64)},
    "optimizer": {"a.exp_avg": torch.randn(3, 4, dtype=torch.float64), "half": torch.randn(2).bfloat16()},
}


def write_lora(folder):
    (folder / "lora").mkdir()
    (folder / "lora" / "README.md").write_text("a model card")


def save(run, epoch, value=0):
    folder = checkpoint_path(run, epoch)
    save_checkpoint(folder, tensors=TENSORS, values={"epoch": epoch, "value": value}, extra=write_lora)
    return folder


def test_tensors_and_values_come_back_bit_exactly(tmp_path):
    values = {
        "epoch": 10,
        "alpha": 0.1 + 0.2,
        "tiny": 5e-324,
        "minus_zero": -0.0,
        "large": 2**70,
        "nested": {"list": [1, 2.5, None, True, "ä"]},
    }
    save_checkpoint(tmp_path / "epoch_000010", tensors=TENSORS, values=values)
    tensors, loaded = load_checkpoint(tmp_path / "epoch_000010")
    assert loaded == values
    assert str(loaded["minus_zero"]) == "-0.0"
    for group, content in TENSORS.items():
        for name, tensor in content.items():
            assert tensors[group][name].dtype == tensor.dtype
            assert torch.equal(tensors[group][name], tensor)


def test_views_shared_and_transposed_tensors_are_saved_as_they_look(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    group = {"whole": base, "transposed": base.T, "row": base[1], "scalar": base[0, 1], "empty": base[:0]}
    save_checkpoint(tmp_path / "epoch_000001", tensors={"weights": group, "none": {}}, values={})
    tensors, _ = load_checkpoint(tmp_path / "epoch_000001")
    assert tensors["none"] == {}
    for name, tensor in group.items():
        assert torch.equal(tensors["weights"][name], tensor)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": {"b": [0.0, float("nan")]}}, r"values\.a\.b\.1 is nan: a checkpoint holds finite numbers only"),
        ({"a": float("inf")}, r"values\.a is inf"),
        ({"a": {3: 1}}, r"values\.a has the key 3"),
        ({"a": torch.ones(1)}, r"values\.a is a Tensor: convert it to int.*or pass it in `tensors`"),
        ({"a": np.float32(1)}, r"values\.a is a float32"),
    ],
)
def test_values_that_json_would_change_are_refused_by_their_path(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path / "epoch_000001", tensors={}, values=values)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_pickled_and_everything_is_in_the_manifest(tmp_path):
    folder = save(tmp_path, 10)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"weights.safetensors", "optimizer.safetensors", "values.json", "manifest.json", "lora/README.md"}
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == files - {"manifest.json"}


@pytest.mark.parametrize("name", ["weights.safetensors", "values.json", "lora/README.md"])
@pytest.mark.parametrize("damage", ["truncate", "remove", "modify"])
def test_damage_is_named_with_the_checkpoint_to_use_instead(tmp_path, name, damage):
    save(tmp_path, 5)
    folder = save(tmp_path, 10)
    path = folder / name
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[:-7])
        expected = f"{name} has {len(content) - 7} bytes, {len(content)} were written"
    elif damage == "remove":
        path.unlink()
        expected = rf"{name} \({len(content)} bytes\) is missing"
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        expected = f"{name} has the {len(content)} bytes that were written but other contents"
    with pytest.raises(CheckpointError, match=f"epoch_000010 is damaged: {expected}.*--checkpoint epoch_000005"):
        load_checkpoint(folder)
    assert not is_intact(folder)


@pytest.mark.parametrize("content", [None, "", '{"files": {"a"', "[]"])
def test_a_damaged_manifest_is_named(tmp_path, content):
    folder = save(tmp_path, 10)
    (folder / "manifest.json").unlink()
    if content is not None:
        (folder / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest.json.*No other checkpoint of this run is intact"):
        load_checkpoint(folder)


def test_a_missing_checkpoint_is_an_error_that_names_a_good_one(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(CheckpointError, match="there is no checkpoint .*epoch_000099.*--checkpoint epoch_000005"):
        load_checkpoint(checkpoint_path(tmp_path, 99))


def test_names_order_by_epoch_beyond_six_digits(tmp_path):
    for epoch in (999_999, 5, 1_000_000):
        save(tmp_path, epoch)
    (tmp_path / "checkpoints" / "epoch_notes").mkdir()
    assert [checkpoint_epoch(path) for path in list_checkpoints(tmp_path)] == [5, 999_999, 1_000_000]
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1_000_000)
    with pytest.raises(CheckpointError, match="must be named like"):
        checkpoint_epoch(tmp_path / "last")


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert list_checkpoints(tmp_path) == []
    assert latest_checkpoint(tmp_path) is None


def test_a_failing_save_leaves_the_previous_checkpoint_and_no_rubbish(tmp_path):
    save(tmp_path, 5)

    def fail(folder):
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(
        WriteError, match="cannot write .*epoch_000010: No space left on device; epoch_000005 is intact"
    ):
        save_checkpoint(checkpoint_path(tmp_path, 10), tensors={}, values={}, extra=fail)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["epoch_000005"]


def test_leftovers_of_a_killed_run_are_ignored_and_swept(tmp_path):
    folder = save(tmp_path, 5)
    leftover = folder.with_name(".partial_epoch_000010")
    leftover.mkdir()
    (leftover / "weights.safetensors").write_text("half")
    assert latest_checkpoint(tmp_path) == folder
    save(tmp_path, 10)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["epoch_000005", "epoch_000010"]


def test_a_replacement_killed_between_its_renames_is_undone(tmp_path):
    folder = save(tmp_path, 5)
    folder.rename(folder.with_name(".replaced_epoch_000005"))
    assert latest_checkpoint(tmp_path) == folder
    assert is_intact(folder)


def test_the_next_save_does_not_sweep_away_what_a_killed_replacement_left(tmp_path):
    folder = save(tmp_path, 5)
    folder.rename(folder.with_name(".replaced_epoch_000005"))
    save(tmp_path, 10)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["epoch_000005", "epoch_000010"]
    assert is_intact(folder)


def test_an_existing_checkpoint_is_replaced(tmp_path):
    save(tmp_path, 5, value=1)
    assert load_checkpoint(save(tmp_path, 5, value=2))[1]["value"] == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["epoch_000005"]


def test_prune_keeps_the_newest(tmp_path):
    for epoch in (1, 2, 3, 4):
        save(tmp_path, epoch)
    assert [path.name for path in prune(tmp_path, 2)] == ["epoch_000001", "epoch_000002"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["epoch_000003", "epoch_000004"]


def test_a_checkpoint_is_hidden_before_its_files_go(tmp_path, monkeypatch):
    save(tmp_path, 1), save(tmp_path, 2), save(tmp_path, 3)
    deleted, rmtree = [], shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: (deleted.append(path.name), rmtree(path, **options)))
    prune(tmp_path, 2), discard_after(tmp_path, 2), save(tmp_path, 2)
    assert {".removed_epoch_000001", ".removed_epoch_000003", ".replaced_epoch_000002"} <= set(deleted)
    assert all(name.startswith(".") for name in deleted)


def test_prune_never_removes_the_only_good_one(tmp_path):
    for epoch in (1, 2, 3, 4):
        save(tmp_path, epoch)
    for epoch in (3, 4):
        (checkpoint_path(tmp_path, epoch) / "values.json").unlink()
    prune(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["epoch_000002", "epoch_000003", "epoch_000004"]


def test_discard_after_removes_what_a_resumed_run_abandons(tmp_path):
    for epoch in (1, 2, 3):
        save(tmp_path, epoch)
    discard_after(tmp_path, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["epoch_000001"]


def _save_forever(run, announce):
    """Writes epochs in turn, each twice so that replacement is exercised, pruned to one; announces what is safe."""
    for epoch in range(1, 10**6):
        for value in (0, 1):
            save(run, epoch, value)
            announce.send_bytes(epoch.to_bytes(8, "big"))
        prune(run, 1)


def test_kill_at_any_moment_leaves_a_valid_checkpoint(tmp_path):
    """SIGKILL 20 times at random moments: what was announced as saved, or something newer, loads each time."""
    context = multiprocessing.get_context("fork")
    moments = random.Random(0)
    seen = set()
    for attempt in range(20):
        run = tmp_path / str(attempt)
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_save_forever, args=(run, sender))
        child.start()
        sender.close()
        assert receiver.poll(timeout=120), "the child saved nothing"
        announced = int.from_bytes(receiver.recv_bytes(), "big")
        time.sleep(moments.uniform(0, 0.06))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        while receiver.poll():
            try:
                announced = int.from_bytes(receiver.recv_bytes(), "big")
            except EOFError:
                break
        seen.update(path.name.split("_")[0] for path in (run / "checkpoints").iterdir())
        assert all(is_intact(path) for path in list_checkpoints(run))
        latest = latest_checkpoint(run)
        assert checkpoint_epoch(latest) >= announced
        tensors, values = load_checkpoint(latest)
        assert values["epoch"] == checkpoint_epoch(latest)
        assert torch.equal(tensors["weights"]["a"], TENSORS["weights"]["a"])
        save(run, values["epoch"] + 1)
        assert all(path.name.startswith("epoch_") for path in (run / "checkpoints").iterdir())
    assert ".partial" in seen, "no kill fell into a save: the test shows nothing"


def test_random_states_continue_exactly(tmp_path):
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)
    random.gauss(0, 1), np.random.standard_normal()  # noqa: NPY002  leaves a cached second normal in both
    tensors, values = rng_state()
    save_checkpoint(tmp_path / "epoch_000001", tensors={"rng_0": tensors}, values={"rng": values})

    def draw():
        numpy = np.random.standard_normal(3)  # noqa: NPY002
        return [random.gauss(0, 1), random.random(), *numpy, *torch.randn(3).tolist()]

    expected = draw()
    loaded_tensors, loaded_values = load_checkpoint(tmp_path / "epoch_000001")
    set_rng_state(loaded_tensors["rng_0"], loaded_values["rng"])
    assert draw() == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_cuda_state_without_a_cuda_device_is_a_warning():
    tensors, values = rng_state()
    with pytest.warns(UserWarning, match="taken on a CUDA device"):
        set_rng_state({**tensors, "cuda": torch.zeros(16, dtype=torch.uint8)}, values)
