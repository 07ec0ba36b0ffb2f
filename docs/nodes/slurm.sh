#!/bin/bash
# Merges config.yml into merged/ on four nodes, by eight ranks on each:
#   sbatch slurm.sh config.yml merged
# Submit it again, or let Slurm requeue it, to go on from the files that are finished.
#SBATCH --job-name=merge
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --mem=128G
#SBATCH --time=04:00:00
#SBATCH --requeue
set -eu
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # jobs on one node must not meet
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
# shellcheck disable=SC2016  # each task has its own numbers
srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
  export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
  exec mergekit-metagpt merge "$@" --resume
' merge "$@"
