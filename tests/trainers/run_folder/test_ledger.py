"""What a run has written is noted, so that a file that is another one is found when it is read back."""

import json
import os
import signal
import sys

import pytest

from trainers.run_folder import ledger
from trainers.run_folder.folder import RunError, RunFolder
from trainers.run_folder.ledger import WriteError, copy_of, misfit, noted
from trainers.run_folder.records import copy_records, read_record, write_record


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path, "a", "seed: 3\n").path


def damage(path, how):
    content = path.read_bytes()
    if how == "bit":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif how == "cut":
        path.write_bytes(content[:-2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "other":
        path.write_bytes(b"[1, 2]\n")
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("bit", "has the 16 bytes that were written but other contents"),
        ("cut", "has 14 bytes, 16 were written"),
        ("empty", "has 0 bytes, 16 were written"),
        ("other", "has 7 bytes, 16 were written"),
        ("gone", r"\(16 bytes\) is missing"),
    ],
)
def test_a_damaged_record_is_named_and_read_from_a_checkpoints_copy(run, how, reason):
    write_record(run, "x.json", {"value": 1})
    damage(run / "x.json", how)
    with pytest.raises(RunError, match=rf"x.json {reason}, and no checkpoint has a copy"):
        read_record(run, "x.json")
    write_record(run, "x.json", {"value": 1})
    copy_records(run, run / "checkpoints" / "epoch_000001")
    damage(run / "x.json", how)
    assert read_record(run, "x.json") == {"value": 1}


def test_a_copy_of_an_earlier_state_is_not_taken_for_the_last_one(run):
    write_record(run, "x.json", {"value": 1})
    copy_records(run, run / "checkpoints" / "epoch_000001")
    write_record(run, "x.json", {"value": 2})
    damage(run / "x.json", "empty")
    assert copy_of(run, "x.json") is None


@pytest.mark.parametrize("moment", range(6))
def test_a_kill_while_a_file_is_replaced_leaves_the_old_or_the_new_one_and_a_record_that_fits(run, moment):
    """Every file system call of the replacement is a moment to be killed at."""
    write_record(run, "x.json", "old")
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event, arguments):
            nonlocal count
            if event == "os.rename" or (event == "open" and arguments[1] == "w"):
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        sys.addaudithook(hook)
        write_record(run, "x.json", "new")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "there are fewer moments"
    assert misfit(run, "x.json") is None
    assert read_record(run, "x.json") == ("new" if moment >= 4 else "old")


def test_a_first_file_that_a_kill_kept_from_appearing_is_not_missing(run, monkeypatch):
    real = ledger._save
    saves = []

    def once(*arguments):
        if saves:
            raise KeyboardInterrupt
        saves.append(real(*arguments))

    monkeypatch.setattr(ledger, "_save", once)
    with pytest.raises(KeyboardInterrupt), noted(run, "y.json") as partial:
        partial.write_text("1")
    (run / "y.json").unlink()
    assert misfit(run, "y.json") is None


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"files": {}, "sha256": ""}', "\x00"])
def test_a_damaged_ledger_is_told_from_one_that_finds_damage(run, content):
    (run / "files.json").write_text(content)
    assert not ledger.is_kept(run)
    assert misfit(run, "config.yaml") is None


def test_a_flipped_digit_of_a_hash_damages_the_ledger_and_not_the_file(run):
    data = json.loads((run / "files.json").read_text())
    entry = data["files"]["config.yaml"]
    entry["sha256"] = ("0" if entry["sha256"][0] != "0" else "1") + entry["sha256"][1:]
    (run / "files.json").write_text(json.dumps(data))
    assert not ledger.is_kept(run)


def test_a_changed_configuration_is_refused_with_the_command_that_puts_it_back(run):
    copy_records(run, run / "checkpoints" / "epoch_000001")
    (run / "config.yaml").write_text("seed: 4\n")
    with pytest.raises(
        RunError, match=r"config.yaml has the 8 bytes .*: put it back with: cp .*epoch_000001/records/c"
    ):
        RunFolder.open(run)


def test_what_cannot_be_written_is_one_line_and_leaves_what_was_there(run, monkeypatch):
    write_record(run, "x.json", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger, "flush", full)
    with pytest.raises(WriteError, match=r"cannot write .*x.json: No space left on device; everything saved before"):
        write_record(run, "x.json", "new")
    assert read_record(run, "x.json") == "old"
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_metrics_are_what_the_checkpoint_has_seen(run):
    folder = RunFolder(path=run)
    for epoch in (1, 2):
        folder.append_metrics({"epoch": epoch, "reward": epoch / 3})
    seen, checkpoint = folder.metrics_path.read_bytes(), folder.checkpoints / "epoch_000002"
    copy_records(run, checkpoint)
    folder.append_metrics({"epoch": 3})
    assert folder.restore_metrics(checkpoint, after_epoch=2) is None
    assert folder.metrics_path.read_bytes() == seen
    for how in ("bit", "cut", "empty", "other", "gone"):
        damage(folder.metrics_path, how)
        assert "metrics.jsonl was not what the run wrote" in (folder.restore_metrics(checkpoint, after_epoch=2) or "")
        assert folder.metrics_path.read_bytes() == seen
