#!/usr/bin/env bash
# Trains several seeds, each as a job of its own; a task's number is its seed.
#
#   sbatch slurm/array.sh --recipe quick
#   sbatch --array=0-9%4 slurm/array.sh        ten seeds, four at a time
#   python launch.py report runs/cifar-dist-<job id>_*
#
#SBATCH --job-name=cifar-dist
#SBATCH --output=%x-%A_%a.out
#SBATCH --array=0-2
#SBATCH --open-mode=append
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=USR2@120
# Slurm runs a copy of this script from its spool: the project is where it was submitted.
project=${SLURM_SUBMIT_DIR:-$PWD}
[[ -f $project/launch.py ]] || { echo "error: there is no launch.py in $project: submit from its folder" >&2; exit 2; }
# exec: it is this shell that Slurm tells to end.
exec bash "$project/slurm/train.sh" --seed "$SLURM_ARRAY_TASK_ID" "$@"
