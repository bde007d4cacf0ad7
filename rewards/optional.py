"""Import a package that only some rewards need, or say how to install it."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from rewards.base import MissingPackageError


def require(module: str, *, extra: str, reward: str) -> ModuleType:
    """Imports an optional module.

    Args:
        module: As in an import statement.
        extra: Pip extra of `ddpo` that installs it; empty for a dependency of `ddpo` itself.
        reward: Name of the reward, for the message.

    Raises:
        ImportError: The module, or one that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = f"ddpo[{extra}]" if extra else "ddpo"
        raise MissingPackageError(
            f"reward {reward!r} needs {error.name or module}: pip install '{package}' ({error})"
        ) from error


def installed(module: str) -> bool:
    """Whether a module could be imported; imports nothing but its parent packages."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent is missing, or was removed from sys.modules
        return False
