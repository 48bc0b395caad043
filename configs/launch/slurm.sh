#!/usr/bin/env bash
# Train under SLURM, one task a GPU, and go on by itself after preemption or the end of the time limit:
#
#   sbatch --nodes 8 configs/launch/slurm.sh configs/alignment.yaml trainer.num_nodes=8 [key=value …]
#
# Five minutes before its end the job's tasks get SIGTERM; they finish the update, save, and exit with 143, at which the
# job is put back into the queue. Any other status but 0 stays as it is: something is to be mended.
# On several machines the run folder must lie on a file system that all of them share.
#SBATCH --job-name=kosmosg
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm-%x-%j.log
set -uo pipefail

readonly STOPPED=143
cd "${SLURM_SUBMIT_DIR:-.}"
# SIGTERM to the job as a whole reaches this shell too, which must outlive its tasks to see how they ended.
trap : TERM

srun --kill-on-bad-exit=0 "${PYTHON:-.venv/bin/python}" train.py "$@" &
readonly step=$!
while true; do
    wait "$step"
    status=$?
    kill -0 "$step" 2>/dev/null || break # else the trap interrupted the wait
done

if ((status == STOPPED)); then
    echo "stopped and saved; job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
