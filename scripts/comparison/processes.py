"""Runs configurations at each side in processes of their own, on the CPU, in one thread."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template
from typing import Literal

import yaml

from .plan import Planned
from .sides import Side

HERE = Path(__file__).resolve().parent
USER_ERROR = 2
POLL = 0.05
"""Seconds between two looks at the processes."""
GRACE = 60.0
"""Seconds that a process has to end when it is told to; torchrun gives its own 30."""

ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONHASHSEED": "0",
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a configuration ended on one side.

    Attributes:
        kind: `done`; `refused` when the command said no before there was a run, as it does to keys that it does not
            know; else `failed`.
        message: Of the refusal or failure.
    """

    kind: Literal["done", "refused", "failed"]
    message: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one process, or one torchrun, goes through.

    Attributes:
        side: Where.
        batch: Configurations of equally many processes.
        spelling: Which of their `configs` is taken.
    """

    side: Side
    batch: tuple[Planned, ...]
    spelling: int = 0

    @property
    def file(self) -> Path:
        """The file with its jobs; the output of the process lies beside it."""
        return self.side.folder / f"{self.batch[0].name}_{self.spelling}.json"


Outcomes = dict[Side, dict[str, Outcome]]


def build_pipelines(folder: Path) -> None:
    """Builds the pipelines that both sides load."""
    command = [sys.executable, str(HERE / "pipelines.py"), str(folder)]
    subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=True, capture_output=True)


def divide(plan: Sequence[Planned], sides: Sequence[Side], *, jobs: int) -> list[Task]:
    """The work of all sides, for about `jobs` processes at a time: few tasks, since each pays for its imports."""
    alone = [planned for planned in plan if planned.processes == 1]
    several = [(planned,) for planned in plan if planned.processes > 1]
    count = min(max(1, jobs // len(sides)), len(alone))
    batches = [*several, *(tuple(alone[start::count]) for start in range(count))]
    return [Task(side=side, batch=batch) for batch in batches for side in sides]


def run(tasks: Sequence[Task], *, jobs: int) -> Outcomes:
    """Runs tasks, `jobs` at a time; what a side refuses again in its older spelling. Nothing outlives an exception."""
    outcomes: Outcomes = {task.side: {} for task in tasks}
    waiting, running = list(tasks), list[tuple[Task, subprocess.Popen]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop(0)
                running.append((task, start(task)))
            time.sleep(POLL)
            ended = [(task, process) for task, process in running if process.poll() is not None]
            running = [pair for pair in running if pair not in ended]
            for task, process in ended:
                found = read_outcomes(task, process.returncode)
                outcomes[task.side] |= found
                waiting = [*refused(task, found), *waiting]
    finally:
        for _, process in running:
            process.terminate()
        for _, process in running:
            process.wait(GRACE)
    return outcomes


def start(task: Task) -> subprocess.Popen:
    """Starts the process of a task."""
    task.file.write_text(json.dumps([job(task, planned) for planned in task.batch]))
    count = task.batch[0].processes
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)] if count > 1 else []
    with task.file.with_suffix(".txt").open("w") as output:
        return subprocess.Popen(
            [sys.executable, *torchrun, str(HERE / "runner.py"), str(task.file)],
            cwd=task.side.folder,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(task.side.checkout)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def job(task: Task, planned: Planned) -> dict[str, object]:
    """What `runner` needs to know of a run."""
    run, config = task.side.run_folder(planned.name), task.side.folder / f"{planned.name}.yaml"
    placed = {**planned.configs[task.spelling], "run": {"output_dir": str(run.parent), "name": run.name}}
    config.write_text(yaml.safe_dump(placed, sort_keys=False))
    commands = [shlex.split(Template(text).substitute(config=config, run=run)) for text in planned.commands]
    return {"commands": commands, "log": str(config.with_suffix(".log")), "result": str(result_file(task, planned))}


def result_file(task: Task, planned: Planned) -> Path:
    """Where `runner` says how a run has ended."""
    return task.side.folder / f"{planned.name}_{task.spelling}.result"


def read_outcomes(task: Task, status: int) -> dict[str, Outcome]:
    """What became of the runs of a task whose process ended with a status."""
    return {planned.name: _outcome(task, planned, status) for planned in task.batch}


def _outcome(task: Task, planned: Planned, status: int) -> Outcome:
    file = result_file(task, planned)
    if not file.is_file() or (status and planned.processes > 1):
        output = task.file.with_suffix(".txt").name
        return Outcome(kind="failed", message=f"its process ended with status {status} (--keep keeps {output})")
    result = json.loads(file.read_text())
    if result["status"] == 0:
        return Outcome(kind="done", message="")
    is_refused = result["status"] == USER_ERROR and not task.side.run_folder(planned.name).exists()
    return Outcome(kind="refused" if is_refused else "failed", message=result["message"])


def refused(task: Task, found: Mapping[str, Outcome]) -> list[Task]:
    """What the side of a task has refused, in its next spelling; nothing where there is none."""
    spelling = task.spelling + 1
    again = tuple(p for p in task.batch if found[p.name].kind == "refused" and len(p.configs) > spelling)
    return [replace(task, batch=again, spelling=spelling)] if again else []
