"""Text files are read and written in UTF-8, whatever the locale says."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT_MODES = {"r", "w", "a", "x", "r+", "w+", "a+", "rt", "wt"}


def without_encoding(tree):
    """Lines of calls that read or write text in the locale's encoding."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        opens_text = name == "open" and any(mode in TEXT_MODES for mode in modes)
        pipes_text = any(word.arg == "text" for word in node.keywords) and name in ("run", "Popen", "check_output")
        if name in ("read_text", "write_text") or opens_text or pipes_text:
            yield node.lineno


@pytest.mark.parametrize("package", ["ddpo", "rewards", "trainers"])
def test_every_text_file_has_its_encoding_said(package):
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line in without_encoding(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found


def test_the_check_sees_each_kind_of_call():
    source = "a.read_text()\na.write_text('x')\nopen('x', 'w')\na.open('a')\nrun(['x'], text=True)\n"
    fine = "a.read_text(encoding='utf-8')\na.open('rb')\nImage.open(x)\nrun(['x'])\n"
    assert list(without_encoding(ast.parse(source + fine))) == [1, 2, 3, 4, 5]
