"""Which rewards a run is scored by: their identities in `rewards.json`, compared whenever the run continues.

{"rewards": [{"group": "rewards", "name", "hash", "package_version", "versions", "where"}, ...],
 "earlier": [...]}          what a resume has replaced, oldest first
"""

from pathlib import Path

from ddpo.validation import UserError
from rewards import WeightedSum
from rewards.identity import identify
from rewards.registry import BUILT_IN
from trainers.config.locations import placeless
from trainers.parallel.agreement import on_main
from trainers.parallel.processes import Processes
from trainers.run_folder.records import read_record, write_record
from trainers.tracking.progress import Progress

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
        UserError: The processes score with different rewards.
    """
    groups = {"rewards": reward, **({} if heldout is None else {"heldout_rewards": heldout})}
    scored = [
        (group, term, one)
        for group, total in groups.items()
        for term, one in zip(total.terms, total.rewards, strict=True)
    ]
    entries: list[Entry] = [
        {"group": group, **identify(one, options=placeless(term.options)).to_json(), "name": one.name}
        for group, term, one in scored
    ]
    _compare_processes(entries, processes)
    recorded = on_main(lambda: read_record(run, REWARDS), processes)
    if not processes.is_main:
        return
    saved = recorded or {"rewards": entries, "earlier": []}
    assert isinstance(saved, dict)
    before = {(entry["group"], entry["name"]): entry for entry in saved["rewards"]}
    replaced = []
    for entry, (_, term, _) in zip(entries, scored, strict=True):
        old = before.get((entry["group"], entry["name"]), entry)
        if old["hash"] != entry["hash"]:
            replaced.append(old)
            if warning := _warning(old, entry, built_in=term.name in BUILT_IN):
                progress.line(f"warning: reward {entry['name']!r} {warning}")
    write_record(run, REWARDS, {"rewards": entries, "earlier": [*saved["earlier"], *replaced]})


def _warning(old: Entry, new: Entry, *, built_in: bool) -> str:
    """What to say of another hash; nothing where an earlier form of hash changes for a reward of the package itself."""
    if old.get("form") == new["form"]:
        return (
            f"is not what the run began with (hash {str(old['hash'])[:12]}, now {str(new['hash'])[:12]}): its code, "
            f"arguments or weights changed, scores may not compare"
        )
    if built_in:
        return ""
    return "was recorded by an earlier version of ddpo: whether its code, arguments or weights changed cannot be told"


def _compare_processes(entries: list[Entry], processes: Processes) -> None:
    everyones = processes.gather_json([[entry["name"], entry["hash"]] for entry in entries])
    for rank, theirs in enumerate(everyones):
        if theirs != everyones[0]:
            raise UserError(
                f"process {rank} scores with other rewards than process 0 ({theirs}, {everyones[0]}): give all "
                f"machines the same files, weights and servers"
            )
