"""Small files of a run that are read back: each is compared with what the run wrote, and each checkpoint has a copy.

A damaged one is put back from a copy that is exactly what was written last. `metrics.jsonl` is not compared: a
checkpoint's copy is what it has seen, and a run that goes on from there goes on with it.
"""

import json
import shutil
from pathlib import Path

from trainers.run_folder import ledger
from trainers.run_folder.folder import BEST, METRICS, RunError


def write_record(run: Path, name: str, value: object) -> None:
    """Writes a value as JSON that replaces the file at once."""
    with ledger.noted(run, name) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_record(run: Path, name: str) -> object:
    """The value of a record, as it was written; None where there never was one.

    Raises:
        RunError: It is damaged, and no checkpoint has a copy.
    """
    path = run / name
    if (reason := ledger.misfit(run, name)) is not None:
        path = ledger.copy_of(run, name) or refuse(reason)
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}): put it back, or remove it to go on without") from error


def copy_records(run: Path, checkpoint: Path) -> None:
    """Copies the small files of a run into a checkpoint that is being written."""
    names = [name for name in ledger.recorded(run) if is_small(name)]
    for name in [*names, METRICS]:
        if (run / name).is_file():
            (checkpoint / ledger.COPIES / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / name, checkpoint / ledger.COPIES / name)


def is_small(name: str) -> bool:
    """Whether checkpoints have copies of a file of that name."""
    return not name.endswith(".safetensors") and not name.startswith(f"{BEST}/")


def refuse(reason: str) -> Path:
    """Raises RunError for a damaged file that cannot be put back."""
    raise RunError(
        f"{reason}, and no checkpoint has a copy: put it back, or, if you changed it and know that it fits, remove "
        f"{ledger.LEDGER} of the run"
    )
