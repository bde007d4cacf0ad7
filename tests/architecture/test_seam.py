"""The seam for algorithms: only an objective and the configuration know which algorithm runs."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSIDE = ("ddpo/objectives/", "trainers/config")
OWN_KEYS = {"surrogate", "step_fraction", "train_guidance", "inner_epochs", "noise_free_steps"}
SHIPPED = sorted(
    path
    for package in ("ddpo", "rewards", "trainers", "benchmarks", "scripts")
    for path in (ROOT / package).rglob("*.py")
)


def outside() -> list[tuple[str, ast.Module]]:
    names = [(str(path.relative_to(ROOT)), path) for path in SHIPPED]
    return [(name, ast.parse(path.read_text())) for name, path in names if not name.startswith(INSIDE)]


def attributes(tree: ast.Module) -> list[tuple[int, str, str]]:
    """Line, owner and name of every attribute that is read."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [(node.lineno, ast.unparse(node.value), node.attr) for node in nodes]


def test_an_algorithms_own_keys_are_read_by_the_objective_and_the_configuration_alone() -> None:
    wrong = [
        f"{name}:{line} {owner}.{key}"
        for name, tree in outside()
        for line, owner, key in attributes(tree)
        if key in OWN_KEYS or (owner.endswith("objective") and key == "kind")
    ]
    assert not wrong, "ask the objective's demand"


def test_no_key_of_an_algorithm_is_spelt_out_as_a_text_elsewhere() -> None:
    wrong = [
        f"{name}:{node.lineno} {node.value!r}"
        for name, tree in outside()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in OWN_KEYS | {"objective.kind"}
    ]
    assert not wrong, "a key that is looked up by its name is read all the same"


def test_of_a_configured_objective_nothing_but_what_it_builds_is_used() -> None:
    wrong = [
        f"{name}:{line} {owner}.{key}"
        for name, tree in outside()
        for line, owner, key in attributes(tree)
        if re.search(r"config\.objective$", owner) and key != "build"
    ]
    assert not wrong


def test_nothing_branches_on_the_kind_of_an_objective() -> None:
    wrong = [
        f"{name}:{node.lineno}"
        for name, tree in outside()
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and re.search(r"objective\.kind|PolicyGradient", ast.unparse(node))
    ]
    assert not wrong
