"""Import a Python file by its path, or a module by its name, with errors that say what to write instead."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import cast

from rewards.base import MissingPackageError, UserError
from rewards.process_state import kept
from rewards.reward import describe_exception

_files: dict[Path, ModuleType] = {}


def load(where: str) -> ModuleType:
    """Imports what stands before the colon of `file.py:name` or `module:name`.

    Raises:
        UserError: There is no such file or module, or running the file failed (chained).
        ImportError: The module needs another one that is not installed.
    """
    return load_file(Path(where)) if where.endswith(".py") else load_module(where)


def load_named(spec: str) -> Callable[..., object]:
    """What `file.py:name` or `module:name` names.

    Raises:
        UserError: There is nothing callable of that name; see also `load`.
    """
    where, _, name = spec.rpartition(":")
    target = vars(load(where)).get(name)
    if not callable(target):
        raise UserError(f"{where} has no function {name!r}")
    return cast("Callable[..., object]", target)


def load_file(path: Path) -> ModuleType:
    """Imports a Python file by its path, once per process.

    Raises:
        UserError: No such file, or running it failed (chained).
    """
    full = path.expanduser().resolve()
    if full in _files:
        return _files[full]
    if not full.is_file():
        raise UserError(f"no such file: {path} (looked for {full})")
    name = f"ddpo_file_{full.stem}_{hashlib.sha256(str(full).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, full)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it runs
    try:
        with running(str(path)):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"{path} cannot be run, it {describe_exception(error)}") from error
    _files[full] = module
    return module


def load_module(name: str) -> ModuleType:
    """Imports a module by its dotted name.

    Raises:
        UserError: There is no such module, or this is not a module name.
        ImportError: The module needs another one that is not installed.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"{name!r} is not a module name; write module:name or file.py:name")
    try:
        with running(name):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise MissingPackageError(f"importing {name} needs {error.name!r}, which is not installed") from error
        near = Path(name.replace(".", "/") + ".py")
        hint = f"write {near}:name" if near.is_file() else "install it, or write file.py:name"
        raise UserError(f"there is no module {name!r}; {hint}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{name} cannot be imported, it {describe_exception(error)}") from error


@contextmanager
def running(what: str) -> Iterator[None]:
    """Code of somebody's is run for its definitions: it sees an empty command line, and settings of the process stay.

    Args:
        what: A file, module or entry point, for messages.
    """
    arguments = sys.argv
    sys.argv = [what]
    try:
        with kept(what, may_draw=True):
            yield
    finally:
        sys.argv = arguments
