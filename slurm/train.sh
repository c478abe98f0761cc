#!/usr/bin/env bash
# Trains on whatever the job has: CPUs or GPUs, one node or many.
#
#   sbatch slurm/train.sh
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 slurm/train.sh --recipe strong --seed 1
#
# What is typed after the script goes to launch.py. The run is runs/<job name>-<job id> unless --run-dir names it. Before the
# time limit, and when it is preempted, it saves and the job is requeued; it goes on by itself. See docs/slurm.md.
#
#SBATCH --job-name=cifar-dist
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=USR2@120
# (--signal: to the processes, two minutes before the end. The processes of a node share the CPUs that the job gets, by the
# site's default often one core. Ask for more by `sbatch --cpus-per-task=N`: a number here might be more than a node has.)
set -euo pipefail
# Slurm runs a copy of this script from its spool: the project is where it was submitted.
project=${SLURM_SUBMIT_DIR:-$PWD}
[[ -f $project/launch.py ]] || { echo "error: there is no launch.py in $project: submit from its folder" >&2; exit 2; }
# shellcheck source=slurm/setup.sh
source "$project/slurm/setup.sh"
exec python slurm/job.py train "$@"
