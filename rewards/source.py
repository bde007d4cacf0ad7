"""What a function or class computes, as text: its own code and the names of its own module that it uses.

Imports, comments, docstrings, layout and `@register(...)` are left out, and so is the rest of the module: moving code
to another file or describing it better leaves the text as it was. What imported modules do is not in it.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path


def computed_source(definition: Callable[..., object]) -> str:
    """The text described above; empty where there is no source, as for functions in C.

    Args:
        definition: A function or class; for a method, what counts is its whole class.
    """
    try:
        file = inspect.getsourcefile(definition)
    except TypeError:
        return ""
    outermost = definition.__qualname__.partition(".")[0]
    statements = _statements(file) if file and Path(file).is_file() else ()
    if not any(outermost in stored for stored, _ in statements):  # typed into a console, or made in a loop
        return _alone(definition)
    wanted, chosen = {outermost}, set[int]()
    while new := [
        place for place, (stored, _) in enumerate(statements) if place not in chosen and not wanted.isdisjoint(stored)
    ]:
        chosen.update(new)
        for place in new:
            wanted |= {node.id for node in ast.walk(statements[place][1]) if isinstance(node, ast.Name)}
    return "\n".join(ast.unparse(statements[place][1]) for place in sorted(chosen))


def _statements(file: str) -> tuple[tuple[frozenset[str], ast.stmt], ...]:
    """The statements of a module with the names that each of them gives a value; imports are not among them."""
    module = _Bare().visit(ast.parse(Path(file).read_bytes()))
    assert isinstance(module, ast.Module)
    return tuple((frozenset(_stored(statement)), statement) for statement in module.body)


def _stored(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
        return
    for node in ast.walk(statement):  # an assignment, or one within a condition
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name


def _alone(definition: Callable[..., object]) -> str:
    """The text of the definition itself, where its module cannot be read."""
    try:
        text = inspect.cleandoc("\n" + inspect.getsource(definition))
        return ast.unparse(_Bare().visit(ast.parse(text)))
    except (OSError, TypeError, SyntaxError):
        return ""


class _Bare(ast.NodeTransformer):
    """Takes out what computes nothing."""

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def generic_visit(self, node: ast.AST) -> ast.AST:
        body = getattr(node, "body", None)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            assert isinstance(body, list)
            if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                node.body = body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            node.decorator_list = [entry for entry in node.decorator_list if not _registers(entry)]
        super().generic_visit(node)
        if isinstance(body, list) and not isinstance(node, ast.Module) and not vars(node)["body"]:  # held imports only
            vars(node)["body"] = [ast.Pass()]
        return node


def _registers(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(called) in ("register", "rewards.register")
