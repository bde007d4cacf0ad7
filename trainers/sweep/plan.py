"""Which runs a sweep is made of, how far each has come, and what starts it or goes on with it.

All is refused here that can be, before anything trains: keys and values of the grid, what a run will need, run folders
that hold another configuration.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ddpo.validation import UserError
from rewards.tools.table import table
from trainers.config import Config
from trainers.config.io import load_config
from trainers.config.locations import absolute
from trainers.config.overrides import parse_overrides
from trainers.config.resumed import resume_overrides
from trainers.planning.preflight import preflight
from trainers.run_folder.checkpoint import checkpoint_epoch, latest_checkpoint
from trainers.run_folder.folder import RunFolder
from trainers.run_folder.listing import is_held
from trainers.run_folder.lock import LOCK
from trainers.sweep.grid import Axis, combinations, short_names

_LONGEST_VALUE = 32  # letters of a value in a run's name
_LONGEST_NAME = 150


@dataclass(frozen=True, kw_only=True)
class Member:
    """A run of a sweep.

    Attributes:
        run: Its folder.
        config: What it is to be trained by.
        overrides: `--key value` tokens that make it of the sweep's configuration.
        values: Of the keys that the sweep changes, by key.
        seed: Its seed.
    """

    run: Path
    config: Config
    overrides: tuple[str, ...]
    values: dict[str, str]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The runs that one command asks for.

    Attributes:
        source: The configuration, a file or a shipped name.
        folder: What lies beside the runs is written here.
        members: The runs, at least one.
    """

    source: str
    folder: Path
    members: tuple[Member, ...]


def plan_grid(source: str, axes: Sequence[Axis], *, seeds: int, name: str | None, overrides: Sequence[str]) -> Sweep:
    """A run for every combination of the axes' values and every seed, in a folder of the sweep's own.

    Args:
        source: A configuration file or shipped name.
        axes: Keys and their values; none for seeds alone.
        seeds: Runs of each combination: the configuration's seed and those that follow it.
        name: Of the sweep's folder in `run.output_dir`; None takes the configuration's.
        overrides: `--key value` tokens for every run.

    Raises:
        ConfigError: A key or value is none of a configuration.
        UserError: Two runs would be the same, or the overrides name a run.
    """
    if "run.name" in parse_overrides(overrides):
        raise UserError("--run.name: a sweep names its runs itself; --name names the sweep's folder")
    base = load_config(source, overrides)
    folder = base.run.folder / (name or f"{Path(source).stem}-sweep")
    shown = short_names([axis.key for axis in axes])
    members = []
    for number, values in enumerate(combinations(axes)):
        label = _label({shown[key]: value for key, value in values.items()}, number)
        for seed in range(base.seed, base.seed + seeds):
            own = [*(f"--{key}={value}" for key, value in values.items()), f"--seed={seed}"]
            run = folder / "_".join(part for part in (label, f"seed={seed}") if part)
            members.append(make_member(source, run, [*overrides, *own], values))
    refuse_equal(members)
    return Sweep(source=source, folder=folder, members=tuple(members))


def make_member(source: str, run: Path, overrides: Sequence[str], values: dict[str, str]) -> Member:
    """The run of a configuration with `--key value` tokens in the folder `run`.

    Raises:
        ConfigError: A key or value is none of a configuration.
    """
    own = (*overrides, f"--run.output_dir={run.parent}", f"--run.name={run.name}")
    config = load_config(source, own)
    return Member(run=run, config=config, overrides=own, values=values, seed=config.seed)


def refuse_equal(members: Sequence[Member]) -> None:
    """Refuses runs that differ in nothing but their names.

    Raises:
        UserError: Two do, or would share a folder.
    """
    for place, member in enumerate(members):
        for other in members[:place]:
            if member.run == other.run:
                raise UserError(f"two runs would have the name {member.run.name}: {member.values} and {other.values}")
            if member.config == replace(other.config, run=member.config.run):
                raise UserError(
                    f"{other.run.name} and {member.run.name} would be the same run: "
                    "each value may be given once, and must change something"
                )


def _label(values: dict[str, str], number: int) -> str:
    """What a run is called by the values it has, in the letters that names may have; by a number if that is long."""
    parts = [f"{key}={re.sub(r'[^A-Za-z0-9_.+-]+', '-', value).strip('-._')}" for key, value in values.items()]
    fits = all(len(part.partition("=")[2]) in range(1, _LONGEST_VALUE + 1) for part in parts)
    label = "_".join(parts)
    return label if fits and len(label) <= _LONGEST_NAME else f"{number:02d}"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far a run has come.

    Attributes:
        state: `new`, `goes on`, `finished`, or `running` in another process.
        epochs: Finished ones.
        arguments: Of `ddpo train`, to start it or to go on with it; empty where there is nothing to do.
    """

    state: str
    epochs: int = 0
    arguments: tuple[str, ...] = ()


def standing(sweep: Sweep, member: Member) -> Standing:
    """How far a run of a sweep has come.

    Raises:
        ConfigError: Its folder holds a run of another configuration.
        UserError: It has trained for more epochs than are wanted.
    """
    saved_file = RunFolder(path=member.run).config_file
    if not saved_file.is_file():
        return Standing(state="new", arguments=(sweep.source, *member.overrides))
    wanted = absolute(member.config)
    changes = resume_overrides(load_config(saved_file), wanted, saved_file=saved_file)
    newest = latest_checkpoint(member.run)
    done = 0 if newest is None else checkpoint_epoch(newest)
    if done > wanted.epochs:
        where = "--name, or another --run.output_dir"
        raise UserError(f"{member.run} has trained for {done} epochs, not {wanted.epochs}; choose another {where}")
    if is_held(member.run / LOCK):
        return Standing(state="running", epochs=done)
    longer = any(change.startswith(("--epochs=", "--max_minutes=")) for change in changes)
    if _has_ended(member.run, newest) and (done == wanted.epochs or not longer):
        return Standing(state="finished", epochs=done)
    return Standing(state="goes on", epochs=done, arguments=("--resume", str(member.run), *changes))


def _has_ended(run: Path, newest: Path | None) -> bool:
    """Whether a run has reached its end since it was last resumed: its summary is newer than everything it sums up."""
    summary, earlier = run / "summary.json", (RunFolder(path=run).config_file, *([] if newest is None else [newest]))
    return summary.is_file() and all(summary.stat().st_mtime_ns >= path.stat().st_mtime_ns for path in earlier)


def check(sweep: Sweep, standings: Sequence[Standing], *, here: bool) -> None:
    """Checks what the runs that are still to train will need.

    Args:
        sweep: The runs.
        standings: Of each.
        here: Whether they are to train on this machine.

    Raises:
        UserError: Something is missing or does not fit; the message names the first run concerned.
    """
    for member, reached in zip(sweep.members, standings, strict=True):
        if not reached.arguments:
            continue
        try:
            preflight(member.config, num_processes=1, here=here, resumed=None if reached.state == "new" else member.run)
        except UserError as error:
            raise UserError(f"{member.run.name}: {error}") from error


def describe(sweep: Sweep, standings: Sequence[Standing]) -> str:
    """The runs and how far they have come, as a table for people."""
    keys = list(sweep.members[0].values)
    rows = []
    for number, (member, reached) in enumerate(zip(sweep.members, standings, strict=True)):
        at = f"{reached.state} at epoch {reached.epochs}" if reached.state == "goes on" else reached.state
        rows.append([str(number), *member.values.values(), str(member.seed), at, member.run.name])
    return f"sweep folder: {sweep.folder}\n{table(['', *keys, 'seed', 'state', 'run'], rows)}"
