"""What a run has written: size and SHA-256 of every file of its folder that is read back, in `files.json`.

    {"files": {NAME: {"size", "sha256", "before"}}, "sha256": of "files"}          NAME relative to the run folder

A file is written under a hidden name, noted, renamed and noted again, so that a kill at any moment leaves the old file
or the new one, and a note that fits it: while a file is replaced, `before` says what stood there (null for nothing),
and either counts. Who reads a file back compares it first (`misfit`). A folder without `files.json`, or with a damaged
one, is read without being compared.

Only the process that holds the run's lock writes here.
"""

import functools
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypedDict

from safetensors import SafetensorError

from ddpo.validation import UserError

LEDGER = "files.json"
COPIES = "records"
"""The folder of a checkpoint that has copies of the small files; see `trainers.run_folder.records`."""

_TICK_NS = 2_000_000_000  # file systems count time in steps of up to two seconds

Files = dict[str, dict]


class Entry(TypedDict):
    """Size in bytes and SHA-256, hexadecimal, of a file."""

    size: int
    sha256: str


class WriteError(UserError):
    """A file of a run cannot be written, as on a full disk; the message names it, what is intact, and how to go on."""


def entry_of(path: Path) -> Entry:
    """Size and hash of a file; one whose time of change is the same, and not just now, is not read twice."""
    about = path.stat()
    is_settled = time.time_ns() - max(about.st_mtime_ns, about.st_ctime_ns) > _TICK_NS
    digest = _digest if is_settled else _digest.__wrapped__
    stamp = (about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)
    return {"size": about.st_size, "sha256": digest(path, *stamp)}


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, *_stamp: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def told(path: Path, *, intact: str) -> Iterator[None]:
    """Turns what a file system refuses in a `with` block into one line.

    Args:
        path: What is written.
        intact: What is not lost by it, and how to go on.

    Raises:
        WriteError: The block could not write.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error).strip().splitlines()[0]
        raise WriteError(f"cannot write {path}: {reason}; {intact}") from error


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write to, which takes its place at once at the end of a `with` block.

    Raises:
        WriteError: It cannot be written; `path` is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    with told(path, intact="what stood there is intact; make room, or make it writable, and run the command again"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            flush(partial)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def replace_text(path: Path, text: str) -> None:
    """Writes a text, in UTF-8, that replaces the file at once."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def flush(path: Path) -> None:
    """Forces a file or, so that a rename survives a power cut, a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def noted(run: Path, name: str) -> Iterator[Path]:
    """A path to write a file of a run to, which takes its place at once at the end of a `with` block and is noted.

    Args:
        run: The run folder.
        name: The file's, relative to it.

    Raises:
        WriteError: It cannot be written; what stood there is intact.
    """
    path = run / name
    with told(path, intact=f"everything saved before is intact; make room and go on with: ddpo train --resume {run}"):
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            flush(partial)
            entry = entry_of(partial)
            before = entry_of(path) if path.is_file() else None
            _save(run, {**_files(run), name: {**entry, "before": before}})
            partial.replace(path)
            _save(run, {**_files(run), name: dict(entry)})
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def note(run: Path, *names: str) -> None:
    """Notes files as they are."""
    if names:
        _save(run, {**_files(run), **{name: dict(entry_of(run / name)) for name in names}})


def forget(run: Path, *names: str) -> None:
    """Takes files out of the record, before they are removed."""
    files = _files(run)
    if any(name in files for name in names):
        _save(run, {name: entry for name, entry in files.items() if name not in names})


# ---- reading ---------------------------------------------------------------------------------------------------------


def is_kept(run: Path) -> bool:
    """Whether there is a record that can be read."""
    return _read(run) is not None


def recorded(run: Path) -> dict[str, Entry]:
    """What was written last, by name."""
    return {name: {"size": entry["size"], "sha256": entry["sha256"]} for name, entry in _files(run).items()}


def misfit(run: Path, name: str) -> str | None:
    """How a file differs from what the run wrote; None where it does not, or nothing is recorded of it.

    The file is read before the record, so that a run which replaces both meanwhile is not misread.
    """
    path = run / name
    found = entry_of(path) if path.is_file() else None
    expected = _files(run).get(name)
    if expected is None:
        return None
    if found == {"size": expected["size"], "sha256": expected["sha256"]} or found == expected.get("before", ...):
        return None
    if found is None:
        return f"{path} ({expected['size']} bytes) is missing"
    if found["size"] != expected["size"]:
        return f"{path} has {found['size']} bytes, {expected['size']} were written"
    return f"{path} has the {found['size']} bytes that were written but other contents"


def copy_of(run: Path, name: str) -> Path | None:
    """The newest copy in a checkpoint that is exactly what was written last, or None."""
    wanted = recorded(run).get(name)
    copies = sorted(run.glob(f"checkpoints/epoch_*/{COPIES}/{name}"), reverse=True)
    if name.startswith("best/"):  # a checkpoint after that epoch has the same weights
        copies = [path for path in [run / "checkpoints" / name.removeprefix("best/")] if path.is_file()]
    return next((copy for copy in copies if entry_of(copy) == wanted), None)


def _files(run: Path) -> Files:
    return _read(run) or {}


def _read(run: Path) -> Files | None:
    """The record; None where there is none, or it is damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        data = json.loads((run / LEDGER).read_text(encoding="utf-8"))
        if _hash(data["files"]) == data["sha256"]:
            return data["files"]
    return None


def _save(run: Path, files: Files) -> None:
    replace_text(run / LEDGER, json.dumps({"files": files, "sha256": _hash(files)}, indent=1) + "\n")


def _hash(files: Files) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
