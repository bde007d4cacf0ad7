"""Refuses folders and files that cannot be written, before the work whose result they are to hold."""

import os
from pathlib import Path

from ddpo.validation import UserError

_LONGEST_NAME = 255  # bytes, of all usual file systems


def check_folder(name: str, folder: Path) -> None:
    """Refuses a folder that can neither be written nor made.

    Args:
        name: What the user calls it, such as `run.output_dir` or `--output`.
        folder: The folder; the nearest parent that exists decides where it does not.

    Raises:
        UserError: It, or a parent, is a file, may not be written, or has a name that no file system takes.
    """
    folder = folder.absolute()
    too_long = next((part for part in folder.parts if len(os.fsencode(part)) > _LONGEST_NAME), "")
    if too_long:
        raise UserError(f"{name}: a folder's name has at most {_LONGEST_NAME} bytes, {too_long[:40]}... is longer")
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"{name}: cannot make {folder}: {existing} is a file; choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{name}: cannot write to {existing}; make it writable or choose another folder")


def check_file(name: str, file: Path) -> None:
    """Refuses a file that cannot be written: it is a folder, it is protected, or its folder does not exist.

    Args:
        name: What the user calls it, such as `--json`.
        file: The file, which may exist.

    Raises:
        UserError: It cannot be written.
    """
    if file.is_dir():
        raise UserError(f"{name}: {file} is a folder; name a file")
    if not file.parent.is_dir():
        raise UserError(f"{name}: there is no folder {file.parent} to write {file.name} to")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"{name}: cannot write {file}; choose another file")
