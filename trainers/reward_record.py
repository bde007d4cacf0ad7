"""Which rewards a run is scored by: their identities in `rewards.json`, compared whenever the run continues.

{"rewards": [{"group": "rewards", "name", "hash", "package_version", "versions", "where"}, ...],
 "earlier": [...]}          what a resume has replaced, oldest first
"""

import json
from pathlib import Path

from rewards import WeightedSum
from rewards.identity import identify
from trainers.processes import Processes
from trainers.progress import Progress
from trainers.run import write_json

REWARDS = "rewards.json"

Entry = dict[str, object]


def record_rewards(
    run: Path, reward: WeightedSum, heldout: WeightedSum | None, processes: Processes, progress: Progress
) -> None:
    """Writes the identities of a run's rewards, and warns of those that are not what the run began with.

    Args:
        run: The run folder.
        reward: What is optimised.
        heldout: What is only measured.
        processes: Who shares the run.
        progress: Shows the warnings.

    Raises:
        ValueError: The processes score with different rewards.
    """
    groups = {"rewards": reward, **({} if heldout is None else {"heldout_rewards": heldout})}
    entries: list[Entry] = [
        {"group": group, **identify(one, options=term.options).to_json(), "name": one.name}
        for group, total in groups.items()
        for term, one in zip(total.terms, total.rewards, strict=True)
    ]
    _compare_processes(entries, processes)
    if not processes.is_main:
        return
    file = run / REWARDS
    saved = json.loads(file.read_text()) if file.is_file() else {"rewards": entries, "earlier": []}
    before = {(entry["group"], entry["name"]): entry for entry in saved["rewards"]}
    replaced = []
    for entry in entries:
        old = before.get((entry["group"], entry["name"]), entry)
        if old["hash"] != entry["hash"]:
            replaced.append(old)
            progress.line(
                f"warning: reward {entry['name']!r} is not what the run began with (hash {str(old['hash'])[:12]}, now "
                f"{str(entry['hash'])[:12]}): its code, arguments or weights changed, scores may not compare"
            )
    write_json(file, {"rewards": entries, "earlier": [*saved["earlier"], *replaced]})


def _compare_processes(entries: list[Entry], processes: Processes) -> None:
    everyones = processes.gather_json([[entry["name"], entry["hash"]] for entry in entries])
    for rank, theirs in enumerate(everyones):
        if theirs != everyones[0]:
            raise ValueError(
                f"process {rank} scores with other rewards than process 0 ({theirs}, {everyones[0]}): give all "
                f"machines the same files, weights and servers"
            )
