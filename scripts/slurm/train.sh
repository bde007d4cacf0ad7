# shellcheck shell=bash
# What the sbatch files here do, once SLURM has read their headers. Submit from the root of this repository:
#
#   sbatch scripts/slurm/single_node.sbatch CONFIG [--key value ...]
#
# One task a GPU, started by srun itself, which passes signals on to them; torchrun would give a run 30 seconds to stop.
# SLURM warns this script by SIGUSR1 before the time limit. The run then stops between two batches with its last whole
# epoch saved, the job goes back into the queue under its number, and its next start resumes the same run folder.
# So it does when a process died and the others ended with 75, if a checkpoint was written since the start: what kills a
# run again and again at one place is not tried for ever.
# RUNS (default: runs) must be on a file system that all nodes see. PYTHON is the interpreter (default: .venv's).

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
: "${1:?usage: sbatch scripts/slurm/single_node.sbatch CONFIG [--key value ...]}"

name="$SLURM_JOB_NAME-$SLURM_JOB_ID"
runs=${RUNS:-runs}
if [[ -f "$runs/$name/config.yaml" ]]; then
    arguments=(train --resume "$runs/$name")
else
    arguments=(train "$@" --run.output_dir "$runs" --run.name "$name")
fi

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
export MASTER_ADDR MASTER_PORT PYTHON

newest() { find "$runs/$name" -path '*/checkpoints/epoch_*' -prune 2> /dev/null | sort | tail -n 1 || true; }
before=$(newest)

warned=false
cancelled=false
# shellcheck disable=SC2317 # called by the trap
pass_on() {
    warned=true
    kill -USR1 "$step"
}
trap pass_on USR1
trap 'cancelled=true' TERM # scancel, which tells the tasks too

# shellcheck disable=SC2016 # each task expands its own variables
srun bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    exec "$PYTHON" -m trainers "$@"' ddpo "${arguments[@]}" &
step=$!

while true; do # a trap ends a wait
    status=0
    wait "$step" || status=$?
    kill -0 "$step" 2> /dev/null || break
done
if $warned && ((status == 75 || status == 138)); then # stopped cleanly, or still loading when SIGUSR1 came
    scontrol requeue "$SLURM_JOB_ID"
elif ! $cancelled && ((status == 75 || status > 128)) && [[ $(newest) != "$before" ]]; then # a process was lost
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
