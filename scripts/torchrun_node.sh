#!/usr/bin/env bash
# One node of several, by torchrun. On every node, with the same FIRST_HOST:PORT:
#
#   NODES=2 scripts/torchrun_node.sh FIRST_HOST:29500 train CONFIG --run.name NAME [--key value ...]
#   NODES=2 scripts/torchrun_node.sh FIRST_HOST:29500 train --resume runs/NAME
#
# PER_NODE: processes on this node (default: one a GPU). The run folder must be on a file system that all nodes see.
# SIGTERM and Ctrl-C to any of these scripts stop the run cleanly if a batch and a checkpoint take less than torchrun's
# 30 seconds; torchrun itself then exits with 1.
set -euo pipefail
endpoint=${1:?usage: NODES=2 scripts/torchrun_node.sh FIRST_HOST:PORT train CONFIG [--key value ...]}
shift
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes "${NODES:-2}" --nproc_per_node "${PER_NODE:-gpu}" \
    --rdzv_id ddpo --rdzv_backend c10d --rdzv_endpoint "$endpoint" -m trainers "$@"
