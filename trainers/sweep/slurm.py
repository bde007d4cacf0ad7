"""A SLURM array of a sweep's runs: one task a run, which its time limit stops and SLURM starts again to go on."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array={array}
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={output}
# {count} runs of a sweep, one a task. Headers can be overridden: sbatch --time 2:00:00 --array 0-3 FILE
# The 120 seconds must cover one batch and the writing of a checkpoint. A task that is warned of its end, or lost, saves
# its last whole epoch, goes back into the queue and goes on from there. Submitted again, finished runs end at once.
# The table and the report, at any time: {again} --jobs 0
set -uo pipefail
cd {place} || exit 2
PYTHON=${{PYTHON:-{python}}}

{train} --task "$SLURM_ARRAY_TASK_ID" &
run=$!
trap 'kill -USR1 "$run"' USR1
while true; do # a trap ends a wait
    wait "$run"
    status=$?
    kill -0 "$run" 2> /dev/null || break
done
if ((status == 75 || status == 138)); then # stopped cleanly, or still loading when SIGUSR1 came
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$status"
"""


def script(command: Sequence[str], tasks: Sequence[int], *, name: str, folder: Path, jobs: int) -> str:
    """The sbatch file.

    Args:
        command: The `ddpo sweep` that it belongs to, without `--slurm` and `--jobs`.
        tasks: Numbers of the runs that are to train, rising.
        name: Of the job.
        folder: The sweep's folder, where the tasks' output goes.
        jobs: Tasks at a time; 1 leaves it to SLURM.
    """
    at_once = f"%{jobs}" if jobs > 1 else ""
    return _SCRIPT.format(
        name=name,
        array=",".join(map(_range, _stretches(tasks))) + at_once,
        output=shlex.quote(str(folder.absolute() / "slurm-%A_%a.log")),
        count=len(tasks),
        again=shlex.join(["ddpo", *command]),
        place=shlex.quote(str(Path.cwd())),
        python=shlex.quote(sys.executable),
        train=f'"$PYTHON" -m trainers {shlex.join(command)}',
    )


def _stretches(numbers: Sequence[int]) -> list[list[int]]:
    """Rising numbers, those without a gap together."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return parts


def _range(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
