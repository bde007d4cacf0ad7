"""Carries a sweep out: its plan, its runs, its table and its report."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpo.validation import UserError
from trainers.parallel.launcher import num_processes
from trainers.report.page import REPORT, write_report
from trainers.run_folder.writable import check_folder
from trainers.sweep.bar import Bar
from trainers.sweep.grid import read_axes
from trainers.sweep.launch import Failure, Task, train_all
from trainers.sweep.outcome import TABLE, write_table
from trainers.sweep.plan import Member, Standing, Sweep, check, describe, plan_grid, standing
from trainers.sweep.slurm import script
from trainers.tracking.progress import say


@dataclass(frozen=True, kw_only=True)
class SweepRequest:
    """What `ddpo sweep` is asked for.

    Attributes:
        config: A configuration file or shipped name.
        grid: `key=a,b` texts.
        seeds: Runs of each combination.
        jobs: Processes at a time; 0 trains nothing and shows what there is.
        name: Of the sweep's folder; None takes the configuration's.
        slurm: An sbatch file to write instead of training.
        task: Train only the run of this number, in this process.
        dry_run: Print the plan only.
    """

    config: str
    grid: tuple[str, ...] = ()
    seeds: int = 1
    jobs: int = 1
    name: str | None = None
    slurm: Path | None = None
    task: int | None = None
    dry_run: bool = False


def run_sweep(request: SweepRequest, overrides: Sequence[str]) -> int:
    """Trains what a sweep lacks, then prints its table and writes its report.

    Args:
        request: What is asked for.
        overrides: `--key value` tokens for every run.

    Returns:
        Exit status: 1 if a run failed.

    Raises:
        UserError: Something is wrong with the grid, a run or what it needs; before anything trains.
        RunStopped: On a signal.
    """
    axes = read_axes(request.grid, overrides)
    sweep = plan_grid(request.config, axes, seeds=request.seeds, name=request.name, overrides=overrides)
    check_folder("run.output_dir", sweep.folder)
    if request.task is not None:
        _train_one(sweep, request.task)
        return 0
    standings = plan(sweep, here=request.slurm is None)
    if request.dry_run:
        return 0
    if request.slurm is not None:
        return _write_script(sweep, standings, request, overrides)
    failures = train_missing(sweep, standings, jobs=request.jobs)
    _tell(sweep)
    return int(bool(failures))


def plan(sweep: Sweep, *, here: bool = True) -> list[Standing]:
    """Checks all runs, and prints them with how far each has come.

    Raises:
        UserError: See `trainers.sweep.plan`.
    """
    if num_processes() > 1:
        raise UserError("a sweep starts its runs itself, a process each: run it without torchrun or accelerate launch")
    standings = [standing(sweep, member) for member in sweep.members]
    check(sweep, standings, here=here)
    say(describe(sweep, standings))
    return standings


def train_missing(sweep: Sweep, standings: Sequence[Standing], *, jobs: int) -> list[Failure]:
    """Trains the runs that are new or go on; failures are printed and returned.

    Raises:
        RunStopped: On a signal.
    """
    todo = {
        member.run: (member, reached.arguments)
        for member, reached in zip(sweep.members, standings, strict=True)
        if reached.arguments
    }
    if jobs == 0 or not todo:
        return []
    tasks = [Task(run=run, arguments=arguments) for run, (_, arguments) in todo.items()]
    configs = {run: member.config for run, (member, _) in todo.items()}
    bar = Bar(configs, done=len(standings) - len(todo), total=len(standings))
    try:
        failures = train_all(tasks, jobs=jobs, bar=bar)
    finally:
        bar.close()
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)  # noqa: T201
    return failures


def ended(sweep: Sweep) -> list[Member]:
    """The runs that have reached their ends."""
    return [member for member in sweep.members if standing(sweep, member).state == "finished"]


def _tell(sweep: Sweep) -> None:
    """Prints the table, and writes it and the report of all runs that have ended."""
    members = ended(sweep)
    if not members:
        say("no run has ended yet")
        return
    say(write_table(sweep, members))
    if len(members) < len(sweep.members):
        say(f"{len(sweep.members) - len(members)} of {len(sweep.members)} runs have not ended")
    report = write_report([member.run for member in members], sweep.folder / REPORT)
    say(f"numbers: {sweep.folder / TABLE}\nreport: {report}")


def _write_script(sweep: Sweep, standings: Sequence[Standing], request: SweepRequest, overrides: Sequence[str]) -> int:
    """Writes the sbatch file of the runs that are new or go on."""
    numbers = [number for number, reached in enumerate(standings) if reached.arguments]
    if not numbers:
        raise UserError(f"--slurm: all {len(standings)} runs have ended or are at work; --jobs 0 shows their table")
    assert request.slurm is not None
    sweep.folder.mkdir(parents=True, exist_ok=True)  # SLURM makes no folder for its logs
    text = script(_command(request, overrides), numbers, name=sweep.folder.name, folder=sweep.folder, jobs=request.jobs)
    request.slurm.write_text(text, encoding="utf-8")
    say(f"{request.slurm}: an array of {len(numbers)} runs; next: sbatch {request.slurm}")
    return 0


def _command(request: SweepRequest, overrides: Sequence[str]) -> list[str]:
    """The command line of the same sweep, without `ddpo` and how it is to train."""
    grids = [word for text in request.grid for word in ("--grid", text)]
    named = [] if request.name is None else ["--name", request.name]
    return ["sweep", request.config, *grids, "--seeds", str(request.seeds), *named, *overrides]


def _train_one(sweep: Sweep, number: int) -> None:
    """Becomes the training of one run, so that a batch system's signals reach it; returns if there is nothing to do."""
    if number >= len(sweep.members):
        raise UserError(f"--task must be below the number of runs, {len(sweep.members)}, got {number}")
    member = sweep.members[number]
    reached = standing(sweep, member)
    if not reached.arguments:
        say(f"{member.run.name}: {reached.state}")
        return
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "trainers", "train", *reached.arguments])
