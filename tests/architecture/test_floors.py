"""The floors of each package: a module may import from its own room and from lower ones, never upwards.

Imports for types alone count too. `python -m tests.architecture.test_floors` prints the numbers.
"""

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the lowest to the highest; a room is a package or a single module.
FLOORS = {
    "ddpo": "validation file_modes seeds placement ragged sampling trajectory credit pipeline weights loading model"
    " policy curvature path_kl displacement steering rollout steered contenders objectives regularization control",
    "ddpo.control": "problems diffusion solvers checks figures",
    "rewards": "base frames nearest clusters spread source process_state optional downloads card results reward"
    " description loading construct registry requirements docstrings identity images models builtin combine preferences"
    " serving tools",
    "trainers": "shipped_configs metadata prompt_files prompts offline config parallel tracking run_folder scoring"
    " evaluation planning pretraining epoch analysis diagnosis report sweep session evaluating exports loop"
    " checkup verification cli",
}


def modules(package):
    """Dotted names of a package's modules, `__init__` as the package itself."""
    folder = ROOT.joinpath(*package.split("."))
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(module, path):
    """`(line, dotted name)` of everything that a file imports, submodules by their own names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                place = ROOT.joinpath(*inner.split("."))
                is_module = place.is_dir() or place.with_suffix(".py").is_file()
                yield node.lineno, inner if is_module else node.module


def room(package, module):
    """The part of a dotted name below its package; None for the package itself or what is outside."""
    return module[len(package) + 1 :].partition(".")[0] or None if module.startswith(package + ".") else None


def edges(package):
    """`(importing module, line, its room, the imported room)` between different rooms."""
    for module, path in modules(package):
        own = room(package, module)
        for line, name in imports(module, path):
            other = room(package, name)
            if own and other and own != other:
                yield module, line, own, other


@pytest.mark.parametrize("package", FLOORS)
def test_every_room_has_a_floor(package):
    rooms = {room(package, module) for module, _ in modules(package)} - {None, "__main__"}
    assert rooms <= set(FLOORS[package].split())


@pytest.mark.parametrize("package", FLOORS)
def test_imports_only_look_down(package):
    floor = {name: height for height, name in enumerate(FLOORS[package].split())}
    upward = [
        f"{module}:{line} ({own} -> {other})"
        for module, line, own, other in edges(package)
        if own in floor and floor[other] > floor[own]
    ]
    assert not upward


def functions(path):
    """`(lines, name)` of every function of a file, docstrings included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.end_lineno - node.lineno + 1, node.name


def report():
    """Prints floors, imports and sizes of each package."""
    for package, order in FLOORS.items():
        floor = {name: height for height, name in enumerate(order.split())}
        between = list(edges(package))
        upward = sum(floor[other] > floor[own] for _, _, own, other in between if own in floor)
        print(f"{package}: {len(floor)} rooms, {len(between)} imports between them, {upward} upward")
        files = [(len(path.read_text().splitlines()), module) for module, path in modules(package)]
        every = [(lines, f"{module}.{name}") for module, path in modules(package) for lines, name in functions(path)]
        median = statistics.median(lines for lines, _ in files)
        print(f"  {len(files)} files, median {median:.0f} lines, largest", *max(files))
        print("  longest function", *max(every))


if __name__ == "__main__":
    report()
