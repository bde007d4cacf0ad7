"""Which prompts a run has: their hashes in `prompts.json`, compared whenever the run continues or is looked back at.

{"training": {"number", "hash"}, "evaluation": {"number", "hash"},
 "earlier": [...]}          training prompts that a resume has replaced, oldest first

Evaluations compare image by image, so their prompts may not change; other training prompts are a warning, as other
rewards are.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from PIL import Image

from ddpo.pipeline.input_images import INPUT_NAMES, identity
from ddpo.validation import UserError
from trainers.parallel.agreement import on_main
from trainers.parallel.processes import Processes
from trainers.prompts import Prompt
from trainers.run_folder.records import read_record, write_record
from trainers.tracking.progress import Progress

PROMPTS = "prompts.json"

Entry = dict[str, object]


def record_prompts(
    run: Path,
    training: Sequence[Prompt],
    evaluated: Sequence[Prompt],
    processes: Processes,
    progress: Progress,
    *,
    accept: Collection[str] = (),
) -> bool:
    """Writes the hashes of a run's prompts, and warns of training prompts that are not what the run began with.

    Args:
        run: The run folder.
        training: All of them.
        evaluated: The evaluation set's, each once.
        processes: Who shares the run.
        progress: Shows the warning.
        accept: Holds `prompts` where other evaluation prompts may take their place, since no epoch is finished yet.

    Returns:
        Whether the evaluation prompts are others, which is accepted.

    Raises:
        UserError: The evaluation prompts differ from those the run began with, or the processes read different ones.
    """
    now = {"training": fingerprint(training), "evaluation": fingerprint(evaluated)}
    everyones = processes.gather_json(now)
    for rank, theirs in enumerate(everyones):
        if theirs != everyones[0]:
            raise UserError(f"process {rank} reads other prompts than process 0: give all machines the same files")
    recorded = on_main(lambda: read_record(run, PROMPTS), processes)
    saved = processes.gather_json(recorded)[0] or {**now, "earlier": []}
    assert isinstance(saved, dict)
    if "prompts" not in accept:
        _compare(run, saved["evaluation"], now["evaluation"])
    before, earlier = saved["training"], saved["earlier"]
    if before != now["training"]:
        earlier = [*earlier, before]
        progress.line(
            f"warning: the training prompts are not what the run began with ({_both(before, now['training'])})"
        )
    if processes.is_main:
        write_record(run, PROMPTS, {**now, "earlier": earlier})
    return bool(saved["evaluation"] != now["evaluation"])


def check_evaluated(run: Path, evaluated: Sequence[Prompt]) -> None:
    """Refuses evaluation prompts that differ from those a run began with; a run that recorded none accepts any.

    Args:
        run: The run folder.
        evaluated: The evaluation set's, each once.

    Raises:
        UserError: They differ.
    """
    saved = read_record(run, PROMPTS)
    if isinstance(saved, dict):
        _compare(run, saved["evaluation"], fingerprint(evaluated))


def fingerprint(prompts: Sequence[Prompt]) -> Entry:
    """Number and SHA-256 of prompts in their order: texts, input images, and metadata as far as it is plain values."""
    digest = hashlib.sha256()
    for prompt in prompts:
        entry = {key: _image(value) if key in INPUT_NAMES else value for key, value in prompt.metadata.items()}
        digest.update(json.dumps([prompt.text, _plain(entry)]).encode() + b"\n")
    return {"number": len(prompts), "hash": digest.hexdigest()}


def _image(source: object) -> str:
    """An input image by its content, so that a moved file is the same one."""
    if isinstance(source, Image.Image):
        return identity(source)
    return hashlib.sha256(Path(str(source)).read_bytes()).hexdigest()


def _plain(value: object) -> object:
    """A value for JSON, the same in every process; of an object that JSON cannot hold, only the name of its type."""
    if isinstance(value, Mapping):
        return sorted([str(key), _plain(item)] for key, item in value.items())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float) else type(value).__name__


def _compare(run: Path, before: Entry, now: Entry) -> None:
    if before != now:
        raise UserError(
            f"{run}: the evaluation prompts are not what the run began with ({_both(before, now)}), so its evaluations "
            "would not compare: restore the prompts, or start a new run"
        )


def _both(before: Entry, now: Entry) -> str:
    return f"{before['number']} of hash {str(before['hash'])[:12]}, now {now['number']} of hash {str(now['hash'])[:12]}"
