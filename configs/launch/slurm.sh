#!/usr/bin/env bash
# Train under SLURM with one task per GPU, and resume automatically after preemption or the end of the time limit:
#
#   sbatch --nodes 8 configs/launch/slurm.sh configs/alignment.yaml trainer.num_nodes=8 [key=value …]
#
# Five minutes before the time limit the tasks receive SIGTERM. They finish the optimizer step, save a checkpoint and exit
# with 143, and the job is requeued. With any other exit status the job ends, because an error has to be fixed.
# On several nodes the run folder must be on a shared file system.
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
# SIGTERM to the whole job reaches this shell, too, which must keep running to read the exit status of its tasks.
trap : TERM

srun --kill-on-bad-exit=0 "${PYTHON:-.venv/bin/python}" train.py "$@" &
readonly step=$!
while true; do
    wait "$step"
    status=$?
    kill -0 "$step" 2>/dev/null || break # otherwise the trap has interrupted the wait
done

if ((status == STOPPED)); then
    echo "stopped and saved; requeuing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
