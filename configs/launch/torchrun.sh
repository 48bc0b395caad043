#!/usr/bin/env bash
# Train on nodes without a scheduler. Run the same command on each node, with its own NODE_RANK:
#
#   NODES=2 NODE_RANK=0 HEAD=10.0.0.1 configs/launch/torchrun.sh configs/alignment.yaml trainer.num_nodes=2 [key=value …]
#
# On one node, NODES, NODE_RANK and HEAD can be left out. On SIGTERM to this script or to any rank, all ranks finish the
# optimizer step, save a checkpoint and stop. torchrun then always exits with 1, so this script exits with 143 if it
# received the signal itself. If the ranks stopped for another reason, it restarts them up to RESTARTS times (default 0).
set -uo pipefail

NODES=${NODES:-1} NODE_RANK=${NODE_RANK:-0} HEAD=${HEAD:-127.0.0.1} PORT=${PORT:-29500}
GPUS=${GPUS:-8} RESTARTS=${RESTARTS:-0}
signalled=0
trap 'signalled=1; kill -TERM "$child" 2>/dev/null' TERM INT

for ((attempt = 0; ; attempt++)); do
    "${TORCHRUN:-.venv/bin/torchrun}" --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "$GPUS" \
        --master-addr "$HEAD" --master-port "$PORT" train.py "$@" &
    child=$!
    while true; do
        wait "$child"
        status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    ((status == 0)) && exit 0
    ((signalled)) && exit 143
    ((attempt < RESTARTS)) || exit "$status"
    echo "restarting, attempt $((attempt + 1)) of $RESTARTS" >&2
done
