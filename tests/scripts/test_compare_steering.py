"""The study of steering: a tiny cell is measured and stored, what is there is not made again, its table."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

FILE = Path(__file__).parents[2] / "scripts" / "compare_steering.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare_steering", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_cell_is_measured_once_and_its_price_is_counted(script, tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--only", "feynman_kac", "--seeds", "3", "--images", "4"]
    script.main(arguments)
    cells = json.loads((tmp_path / "cells.json").read_text())
    assert [cell["size"] for cell in cells] == list(script.KINDS["feynman_kac"][0])
    for cell in cells:
        assert cell["network"] == script.STEPS * cell["size"], "a row a step and particle"
        assert cell["scored"] == script.STEPS / 2 * cell["size"], "before steps 2, 4, 6 and 8, and the ends"
        assert -20 < cell["reward"] < -5 and 0 <= cell["strict"] <= 1
    assert Image.open(tmp_path / "steering.png").width > 1000
    capsys.readouterr()
    script.main(arguments)
    assert "rows, once" not in capsys.readouterr().out, "nothing is measured again"
    assert json.loads((tmp_path / "cells.json").read_text()) == cells


def test_training_pays_from_where_its_price_is_spread_over_enough_images(script, tmp_path):
    cell = script.Cell(
        method="best_of_n", size=4, seed=0, images=8, reward=-9.0, strict=0.5, diversity=0.2, network=40, scored=4,
        seconds=0.4,
    )  # fmt: skip
    tuned = replace(
        cell, method="draft", size=script.TRAINED["draft"][1], reward=-9.5, network=10, seconds=0.1, once=3000,
        once_seconds=60.0,
    )  # fmt: skip
    rows = script.rows_of([cell, tuned])
    assert script.break_even(rows[1], rows, "network", "once") == ("best_of_n 4", 100.0)
    assert tuned.rows(100) == cell.network, "there both cost the same"
    assert script.break_even([replace(tuned, reward=-8.0)], rows, "network", "once") is None
    page, begin, end = tmp_path / "steering.md", *script.MARKS
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    (tmp_path / "images").mkdir()
    script.figure(rows).savefig(tmp_path / "steering.png")
    script.write_docs(rows, tmp_path, tmp_path)
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\n| method") and text.endswith(f"{end}\nafter\n") and "old" not in text
    assert "by rows from 100 images on (against `best_of_n 4`)" in text
