"""Checkpoints that a kill at any moment cannot damage, and damage that cannot go unnoticed.

A checkpoint is a folder `<run>/checkpoints/epoch_000010` of

    <group>.safetensors   one file per group of tensors (policy, optimizer, ...)
    values.json           counters, random states, statistics: everything that is not a tensor
    ...                   whatever `extra` wrote, e.g. a LoRA folder for diffusers
    manifest.json         size and sha256 of every other file

It is written into a hidden sibling, flushed to the disk, and renamed: the final name appears complete or not at all.
Hidden siblings (`.partial_*`, `.replaced_*`, `.removed_*`) are what a killed process left; the next save removes them.
Nothing is pickled. Python integers and floats survive JSON bit-exactly (a float is written as its shortest repr).
"""

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpo.file_modes import open_by_umask
from ddpo.validation import UserError
from trainers.run_folder import ledger
from trainers.run_folder.epochs import epoch_in, epoch_name
from trainers.run_folder.ledger import entry_of, flush

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
VALUES = "values.json"

Tensors = dict[str, dict[str, Tensor]]
Values = dict[str, Any]


class CheckpointError(UserError):
    """A checkpoint is missing or damaged; the message names the file and the checkpoint to use instead."""


def checkpoint_path(run: Path, epoch: int) -> Path:
    """Folder of the checkpoint taken after `epoch` finished epochs."""
    return Path(run) / FOLDER / epoch_name(epoch)


def checkpoint_epoch(folder: Path) -> int:
    """Number of finished epochs in the name of a checkpoint folder."""
    epoch = epoch_in(Path(folder).name)
    if epoch is None:
        raise CheckpointError(f"{folder} is not a checkpoint: the folder must be named like {epoch_name(10)}")
    return epoch


# --- save -------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    values: Values,
    extra: Callable[[Path], None] | None = None,
) -> None:
    """Writes a checkpoint that appears under its name only when it is complete and on the disk.

    Args:
        folder: Final path, e.g. `checkpoint_path(run, 10)`. One that exists is replaced.
        tensors: Groups of named tensors on any device; one safetensors file per group.
        values: What is not a tensor: nested dicts with string keys, lists, str, bool, None, int and finite float.
            Tuples come back as lists.
        extra: Called with the folder being written; may add files and folders, which the manifest then covers.

    Raises:
        ValueError: `values` hold something JSON would lose; the message has its path.
        WriteError: It cannot be written, as on a full disk.
    """
    folder = Path(folder)
    _check_json(values, "values")
    with ledger.told(folder, intact=_intact(folder)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _recover(folder.parent)
        _sweep(folder.parent)
        partial = folder.parent / f".partial_{folder.name}"
        partial.mkdir()
        try:
            if extra is not None:
                extra(partial)
            _write(partial, tensors, values)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _publish(partial, folder)


def _intact(folder: Path) -> str:
    """What is left when a checkpoint cannot be written, and how to go on."""
    before = [path.name for path in (_named(folder.parent) if folder.parent.is_dir() else []) if path != folder]
    left = f"{before[-1]} is intact" if before else "there is no earlier one"
    return f"{left}; make room and go on with: ddpo train --resume {folder.parent.parent}"


def _write(partial: Path, tensors: Mapping[str, Mapping[str, Tensor]], values: Values) -> None:
    """Writes tensors and values, then the manifest over all files, everything flushed to the disk."""
    for name, group in tensors.items():
        assert re.fullmatch(r"\w[\w.-]*", name), f"group name {name!r} must be usable as a file name"
        path = partial / f"{name}.safetensors"
        assert not path.exists(), f"extra() wrote {path.name}, which belongs to the tensors"
        # safetensors refuses tensors that share memory, such as tied weights: each gets its own.
        save_file(
            {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in group.items()}, path
        )
    open_by_umask(partial)
    (partial / VALUES).write_text(json.dumps(values, allow_nan=False) + "\n", encoding="utf-8")
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    entries = {path.relative_to(partial).as_posix(): entry_of(path) for path in files}
    manifest = {"format": 1, "tensors": sorted(tensors), "files": entries}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for path in [*files, partial / MANIFEST, *(p for p in partial.rglob("*") if p.is_dir()), partial]:
        flush(path)


def _publish(partial: Path, folder: Path) -> None:
    """Renames; an existing checkpoint of that name stays recoverable until the new one is in its place."""
    replaced = folder.parent / f".replaced_{folder.name}"
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _recover(parent: Path) -> None:
    """Undoes a replacement that was killed between its two renames."""
    for replaced in parent.glob(".replaced_*"):
        folder = parent / replaced.name.removeprefix(".replaced_")
        if not folder.exists():
            with contextlib.suppress(FileNotFoundError):  # another process of the same run was faster
                replaced.rename(folder)


def _sweep(parent: Path) -> None:
    for prefix in ("partial", "replaced", "removed"):
        for leftover in parent.glob(f".{prefix}_*"):
            shutil.rmtree(leftover)


def _check_json(value: object, where: str) -> None:
    """Refuses what JSON would change silently: NaN, infinities, keys that are not strings, foreign types."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: a checkpoint holds finite numbers only; store None for 'no value yet'")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}: keys must be strings, JSON would turn it into one")
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{where}.{index}")
    elif type(value) not in (str, int, float, bool, type(None)):
        raise ValueError(
            f"{where} is a {type(value).__name__}: convert it to int, float, str, bool, list or dict, "
            "or pass it in `tensors`"
        )


# --- load -------------------------------------------------------------------------------------------------------------


def load_checkpoint(folder: Path, *, groups: Collection[str] | None = None) -> tuple[Tensors, Values]:
    """Reads a checkpoint after comparing what is read with the manifest.

    Args:
        folder: The checkpoint.
        groups: Names of the groups of tensors to read, of which a checkpoint need not have all; None for all of them,
            after every file is compared.

    Returns:
        The `tensors` (on the CPU) and `values` that were saved.

    Raises:
        CheckpointError: Missing or damaged; names the file, its sizes, and the newest intact checkpoint of the run.
    """
    folder = Path(folder)
    try:
        manifest = _verified_manifest(folder, groups)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {_advice(folder)}") from error
    wanted = [name for name in manifest["tensors"] if groups is None or name in groups]
    tensors = {name: load_file(folder / f"{name}.safetensors") for name in wanted}
    return tensors, json.loads((folder / VALUES).read_text(encoding="utf-8"))


def is_intact(folder: Path) -> bool:
    """Whether every file of a checkpoint is as it was written."""
    try:
        _verified_manifest(Path(folder))
    except CheckpointError:
        return False
    return True


def _verified_manifest(folder: Path, groups: Collection[str] | None = None) -> dict:
    """The manifest, once its files, or the values and those of some groups, are found as they were written."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = {
            name: {"size": entry["size"], "sha256": entry["sha256"]} for name, entry in manifest["files"].items()
        }
        if not {VALUES, *(f"{name}.safetensors" for name in manifest["tensors"])} <= entries.keys():
            raise ValueError("it lacks files")
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {MANIFEST} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        size = (folder / MANIFEST).stat().st_size
        raise CheckpointError(f"checkpoint {folder} is damaged: {MANIFEST} ({size} bytes) is not readable") from error
    read = None if groups is None else {VALUES, *(f"{group}.safetensors" for group in groups)}
    for name, expected in entries.items():
        if read is not None and name not in read:
            continue
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} ({expected['size']} bytes) is missing")
        size = path.stat().st_size
        if size != expected["size"]:
            raise CheckpointError(
                f"checkpoint {folder} is damaged: {name} has {size} bytes, {expected['size']} were written"
            )
        if entry_of(path) != expected:
            raise CheckpointError(
                f"checkpoint {folder} is damaged: {name} has the {size} bytes that were written but other contents"
            )
    return manifest


def _advice(folder: Path) -> str:
    others = [other for other in _named(folder.parent) if other != folder]
    good = next((other for other in reversed(others) if is_intact(other)), None)
    if good is None:
        return "No other checkpoint of this run is intact: start a new run"
    return f"Resume from the newest intact one instead: --checkpoint {good.name}"


# --- the checkpoints of a run -----------------------------------------------------------------------------------------


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, damaged ones included."""
    parent = Path(run) / FOLDER
    if not parent.is_dir():
        return []
    _recover(parent)
    return _named(parent)


def _named(parent: Path) -> list[Path]:
    found = (path for path in parent.iterdir() if path.is_dir() and epoch_in(path.name) is not None)
    return sorted(found, key=checkpoint_epoch)


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint, or None. It may be damaged: then loading says so instead of silently taking another."""
    return next(reversed(list_checkpoints(run)), None)


def prune(run: Path, keep_last: int) -> list[Path]:
    """Removes all but the newest `keep_last` checkpoints, and never the newest intact one.

    Returns:
        The folders that were removed.
    """
    assert keep_last >= 1, f"keep_last must be at least 1, got {keep_last}"
    checkpoints = list_checkpoints(run)
    doomed = checkpoints[:-keep_last]
    if doomed and not any(is_intact(path) for path in reversed(checkpoints[-keep_last:])):
        last_good = next((path for path in reversed(doomed) if is_intact(path)), None)
        doomed = [path for path in doomed if path != last_good]
    for path in doomed:
        _remove(path)
    return doomed


def discard_after(run: Path, epoch: int) -> list[Path]:
    """Removes checkpoints later than `epoch`, which a run resumed from that epoch no longer continues."""
    doomed = [path for path in list_checkpoints(run) if checkpoint_epoch(path) > epoch]
    for path in doomed:
        _remove(path)
    return doomed


def _remove(path: Path) -> None:
    """Hides the folder first: a kill during the deletion must not leave half a checkpoint under a valid name."""
    hidden = path.parent / f".removed_{path.name}"
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
