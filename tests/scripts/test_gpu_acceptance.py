"""The acceptance of a GPU: its quick parts on the CPU (`python -m benchmarks.gpu_acceptance --tiny` runs all)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu_acceptance
from benchmarks.gpu_acceptance import PARTS, main, table

QUICK = ("process_group", "split_network", "sd15")


def call(monkeypatch: pytest.MonkeyPatch, out: Path, *parts: str) -> int:
    monkeypatch.setattr("sys.argv", ["gpu_acceptance", "--tiny", "--out", str(out), "--only", *parts])
    return main()


def test_parts_leave_their_numbers_and_are_not_run_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, tmp_path, *QUICK) == 0, capsys.readouterr().out
    parts = json.loads((tmp_path / "acceptance.json").read_text())["parts"]
    assert parts["process_group"]["facts"]["exact"] is True
    assert parts["split_network"]["facts"]["log-probabilities, relative"] == 0
    assert parts["split_network"]["facts"]["gradients, relative"] < 1e-5
    assert parts["sd15"]["facts"]["images/s"] > 0
    assert (tmp_path / "acceptance.md").read_text() == table(parts)
    monkeypatch.setattr(gpu_acceptance, "_run_part", lambda *_: pytest.fail("ran again"))
    assert call(monkeypatch, tmp_path, *QUICK) == 0


def test_a_part_that_fails_or_hangs_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "process_group.json").mkdir()  # the part cannot write there
    monkeypatch.setitem(PARTS, "matmul", replace(PARTS["matmul"], seconds=0))
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    assert call(monkeypatch, tmp_path, "matmul", "process_group", "split_network") == 1
    parts = json.loads((tmp_path / "acceptance.json").read_text())["parts"]
    assert parts["matmul"]["error"].startswith("more than 0 s")
    assert "IsADirectoryError" in parts["process_group"]["error"]
    assert "facts" in parts["split_network"]
    assert "**failed**: more than" in table(parts)


def test_without_a_gpu_it_says_what_runs_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_acceptance", "--out", str(tmp_path / "new")])
    assert main() == 2
    assert "--tiny" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
