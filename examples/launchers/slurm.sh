#!/bin/bash
# Several nodes of a Slurm cluster: sbatch examples/launchers/slurm.sh --dataset CIFAR10 --num-epochs 100
#
# One stage per task of a node (--ntasks-per-node of torchrun, not of Slurm: srun starts one launcher per node). A job
# that is preempted, or runs out of time, saves a snapshot when SIGTERM comes, is queued again, and goes on from there.
#SBATCH --job-name=unlocked
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

STAGES_PER_NODE="${STAGES_PER_NODE:-2}"
head_node="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
# A port of the job's own, so that two jobs on one node don't meet.
port=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export STAGES_PER_NODE head_node port

# The inner shell, one per node, is the one that knows SLURM_NODEID.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
    exec python -m unlocked launch --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" \
        --nproc-per-node="$STAGES_PER_NODE" --master-addr="$head_node" --master-port="$port" \
        -- --resume auto --save-path "${SAVE_PATH:-runs}" --experiment-name "job-$SLURM_JOB_ID" "$@"
' unlocked "$@"
