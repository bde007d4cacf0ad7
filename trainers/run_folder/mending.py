"""Looks through a run folder before a run goes on: what is damaged is put back, made again, or refused by name.

| damaged | what happens |
|---|---|
| a small file (`trainers.run_folder.records`) | put back from a checkpoint's copy |
| the evaluation of the start, or of the epoch to go on from | made again |
| another evaluation | refused; put aside with `--accept evaluations` |
| the best weights | put back from their epoch's checkpoint; else as another evaluation |
| `files.json` itself | noted anew |

A run that has nothing to go on from starts over, and its records with it.
"""

import shutil
from collections.abc import Collection
from pathlib import Path

from trainers.run_folder import ledger
from trainers.run_folder.epochs import epoch_in
from trainers.run_folder.folder import BEST, CONFIG, ENVIRONMENT, RunError, RunFolder
from trainers.run_folder.model_record import MODEL
from trainers.run_folder.prompt_record import PROMPTS
from trainers.run_folder.python_runs import OBJECTS
from trainers.run_folder.records import is_small, refuse
from trainers.run_folder.reward_record import REWARDS

ACCEPT = "evaluations"

START = "start"
"""Folder of what was made of the weights at the start, before anything was trained."""


def mend(run: RunFolder, *, done: int | None, accept: Collection[str] = ()) -> list[str]:
    """Puts the files of a run in order, on the main process.

    Args:
        run: The run folder, locked.
        done: Finished epochs of the checkpoint to go on from; None where the run starts over.
        accept: Holds `evaluations` where damaged ones that cannot be made again may be put aside.

    Returns:
        What was found and done, for people.

    Raises:
        RunError: Something is damaged that counts and that nothing can replace.
    """
    if not ledger.is_kept(run.path):
        return [_noted_anew(run.path)]
    if done is None:
        _start_over(run)
        return []
    misfits = {name: ledger.misfit(run.path, name) for name in ledger.recorded(run.path)}
    lines = []
    for name, reason in misfits.items():
        if reason is not None:
            lines.append(_mended(run, name, reason, done=done, accept=accept))
    return lines


def _noted_anew(run: Path) -> str:
    """Notes what is there, of a run whose record is gone."""
    own = [run / name for name in (CONFIG, ENVIRONMENT, MODEL, OBJECTS, PROMPTS, REWARDS)]
    found = [*own, *run.glob("evaluations/epoch_*.safetensors"), *run.glob("evaluations/epoch_*.json")]
    found += [path for folder in run.glob(f"{BEST}/epoch_*") for path in folder.rglob("*")]
    names = [path.relative_to(run).as_posix() for path in found if path.is_file()]
    state = "is damaged" if (run / ledger.LEDGER).exists() else "is missing"
    ledger.note(run, *names)
    return f"warning: {run / ledger.LEDGER} {state}: files of the run were not compared, and are noted as they are"


def _start_over(run: RunFolder) -> None:
    """Removes what a run without anything to go on from has recorded: prompts, rewards and model may change."""
    of_start = [name for name in ledger.recorded(run.path) if name.startswith(f"{START}/")]
    names = (PROMPTS, REWARDS, MODEL, *of_start)
    ledger.forget(run.path, *names)
    for name in names:
        (run.path / name).unlink(missing_ok=True)
    run.discard_evaluations(after_epoch=-1)


def _mended(run: RunFolder, name: str, reason: str, *, done: int, accept: Collection[str]) -> str:
    """Deals with one damaged file; says how."""
    if (copy := ledger.copy_of(run.path, name)) is not None:
        with ledger.noted(run.path, name) as partial:
            shutil.copyfile(copy, partial)
        return f"warning: {reason}: put back from {copy}"
    path = run.path / name
    epoch = epoch_in(path.stem)
    if name.startswith("evaluations/") and epoch is not None and (epoch in (0, done) or epoch > done):
        run.discard_evaluation(epoch)
        return f"warning: {reason}: " + ("it is made again" if epoch <= done else "a later epoch's, removed")
    if name.startswith(f"{START}/"):
        path.unlink(missing_ok=True)
        ledger.forget(run.path, name)
        return f"warning: {reason}: it is made again"
    if name == ENVIRONMENT or (is_small(name) and name.startswith("evaluations/")):  # nothing reads them back
        ledger.forget(run.path, name)
        return f"warning: {reason}, and no checkpoint has a copy"
    if is_small(name):
        refuse(reason)
    if ACCEPT not in accept:
        raise RunError(
            f"{reason}, and cannot be made again: put it back, or go on without it by ddpo train --resume {run.path} "
            f"--accept {ACCEPT} (in Python accept=[{ACCEPT!r}])"
        )
    aside = path.with_name(f"{path.name}.damaged")
    is_there = path.is_file()
    if is_there:
        path.rename(aside)
    ledger.forget(run.path, name)
    return f"warning: {reason}: " + (f"put aside as {aside.name}" if is_there else "the run goes on without it")
