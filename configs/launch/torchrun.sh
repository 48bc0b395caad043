#!/usr/bin/env bash
# Train on machines without a scheduler. The same command on each of them, with its own NODE_RANK:
#
#   NODES=2 NODE_RANK=0 HEAD=10.0.0.1 configs/launch/torchrun.sh configs/alignment.yaml trainer.num_nodes=2 [key=value …]
#
# On one machine NODES, NODE_RANK and HEAD may be left out. SIGTERM to this script or to any process ends the update,
# saves and stops all of them. torchrun reports 1 whatever stopped its processes, so this script exits with 143 where it
# was told to stop itself; where its processes ended by themselves, it starts them again up to RESTARTS times (default 0).
set -uo pipefail

NODES=${NODES:-1} NODE_RANK=${NODE_RANK:-0} HEAD=${HEAD:-127.0.0.1} PORT=${PORT:-29500}
GPUS=${GPUS:-8} RESTARTS=${RESTARTS:-0}
told=0
trap 'told=1; kill -TERM "$child" 2>/dev/null' TERM INT

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
    ((told)) && exit 143
    ((attempt < RESTARTS)) || exit "$status"
    echo "started again, attempt $((attempt + 1)) of $RESTARTS" >&2
done
