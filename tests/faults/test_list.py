"""The list of kinds of faults names tests that exist."""

import ast
import re

from tests.trainers.loop_helpers import ROOT


def rows() -> list[list[str]]:
    lines = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1:]]


def test_every_kind_of_fault_has_members_and_tests_that_exist() -> None:
    assert len(rows()) >= 15
    for kind, members, tests in rows():
        named = re.findall(r"`([\w/.]+\.py)::(\w+)`", tests)
        assert kind and members and named
        for file, test in named:
            tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
            found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert test in found, f"{kind}: tests/{file} has no {test}"
