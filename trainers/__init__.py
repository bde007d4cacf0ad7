"""Training loops, configuration, state, evaluation, tracking and the command line; imports `ddpo` and `rewards`.

The three packages find each other whatever else is called so: `python -m trainers` looks into the working folder first,
where a user's own `rewards.py` may lie.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_HOME = str(Path(__file__).resolve().parent.parent)
_SIBLINGS = ("ddpo", "rewards")


class _Siblings:
    """Finds the packages that stand beside this one before any others of their names."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """What Python's import asks of a finder; None for all other modules."""
        return PathFinder.find_spec(name, [_HOME], target) if path is None and name in _SIBLINGS else None


for _name in _SIBLINGS:
    _other = getattr(sys.modules.get(_name), "__file__", None)
    if _other is not None and not Path(_other).resolve().is_relative_to(_HOME):
        raise ImportError(
            f"{_other} was imported as {_name!r}, which is a package that trainers needs: rename that file"
        )
sys.meta_path.insert(0, _Siblings)
