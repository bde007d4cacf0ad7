"""Remembers what the first download of a file had where nobody publishes its hash, and refuses another one later.

    downloads.json    {NAME: {"sha256", "size", "modified"}}      in the cache folder of `rewards.models.weights`

A file whose size and time of change are the recorded ones is not read again.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from rewards.base import UserError

RECORD = "downloads.json"
_CHUNK_BYTES = 1 << 20

Entry = dict[str, object]


def cache_folder() -> Path:
    """Where files without a hub are kept: `$DDPO_CACHE/rewards`, else `~/.cache/ddpo/rewards`."""
    return Path(os.environ.get("DDPO_CACHE", Path.home() / ".cache" / "ddpo")) / "rewards"


def check_first(reward: str, name: str, path: Path, *, cure: str) -> None:
    """Compares a downloaded file with what its first download had; records it where this is the first.

    Args:
        reward: Name of the reward, for messages.
        name: What was asked for: repository, revision and file, or an address.
        path: Where it is.
        cure: What to do about another file, besides accepting it.

    Raises:
        UserError: It is another file than at first, or the record cannot be read.
    """
    record = cache_folder() / RECORD
    known = _read(record)
    about = path.stat()
    stamp: Entry = {"size": about.st_size, "modified": about.st_mtime_ns}
    old = known.get(name)
    if old is not None and all(old.get(key) == value for key, value in stamp.items()):
        return
    digest = sha256_of(path)
    if old is not None and old.get("sha256") != digest:
        raise UserError(
            f"reward {reward!r}: {name} has sha256 {digest}, its first download here had {old.get('sha256')}: its "
            f"publisher changed it, so scores would not compare; {cure}, or delete its entry in {record} to accept it"
        )
    record.parent.mkdir(parents=True, exist_ok=True)
    partial = record.with_name(f".{RECORD}.{os.getpid()}")
    partial.write_text(json.dumps({**known, name: {"sha256": digest, **stamp}}, indent=1) + "\n", encoding="utf-8")
    partial.replace(record)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _read(record: Path) -> dict[str, Entry]:
    if not record.is_file():
        return {}
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        if not (isinstance(known, dict) and all(isinstance(entry, dict) for entry in known.values())):
            raise ValueError("it is no dictionary of downloads")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{record} cannot be read ({error}); delete it to begin anew") from error
    return known
