"""Refuses what cannot be written, before the work whose result it is to hold."""

import os
from pathlib import Path


def check_folder(name: str, folder: Path) -> None:
    """Refuses a folder that can neither be written nor made.

    Args:
        name: What the user calls it, such as `run.output_dir` or `--output`.
        folder: The folder; the nearest parent that exists decides where it does not.

    Raises:
        ValueError: It, or a parent, is a file, or may not be written.
    """
    folder = folder.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"{name}: cannot make {folder}: {existing} is a file; choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: cannot write to {existing}; make it writable or choose another folder")


def check_file(name: str, file: Path) -> None:
    """Refuses a file that cannot be written: a folder, one that may not be written, or in a folder that is not there.

    Args:
        name: What the user calls it, such as `--json`.
        file: The file, which may exist.

    Raises:
        ValueError: It cannot be written.
    """
    if file.is_dir():
        raise ValueError(f"{name}: {file} is a folder; name a file")
    if not file.parent.is_dir():
        raise ValueError(f"{name}: there is no folder {file.parent} to write {file.name} to")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{name}: cannot write {file}; choose another file")
