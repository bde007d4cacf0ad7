"""The notebooks of `examples/`: executed as committed, and again here from the first cell to the last."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.ipynb"))
LEFT = {
    "quickstart": ("runs/quickstart/lora", "runs/quickstart/exports", "runs/quickstart/report.html"),
    "your_own_reward": ("warm_rewards.py", "runs/warm/before_after.png"),
}


def read(name):
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_there_is_a_first_one_and_one_on_rewards():
    assert set(NAMES) == set(LEFT)


@pytest.mark.parametrize("name", NAMES)
def test_it_was_executed_in_one_go(name):
    notebook = read(name)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert not [output for cell in code(notebook) for output in cell.outputs if output.output_type == "error"]
    assert os.path.getsize(EXAMPLES / f"{name}.ipynb") < 400_000
    assert "/tmp" not in printed(notebook) and "/root" not in printed(notebook)


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = read(name)
    NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [path for path in LEFT[name] if not (tmp_path / path).exists()] == []
    pictures = [output for cell in code(notebook) for output in cell.outputs if "image/png" in output.get("data", {})]
    assert pictures
    assert "Error" not in printed(notebook)
