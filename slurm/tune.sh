#!/usr/bin/env bash
# Searches for a recipe: each task of the array is a worker of the same study.
#
#   sbatch slurm/tune.sh --recipe quick --trials 100
#   sbatch --array=0-7 --gpus-per-node=1 slurm/tune.sh --study studies/quick-cifar10 --trials 200
#   python launch.py report studies/quick-cifar10
#
# What is typed after the script goes to `launch.py tune`. A worker that is warned or preempted saves its trial and is
# requeued; the next free worker goes on with the trial. See docs/tuning.md.
#
#SBATCH --job-name=cifar-dist-tune
#SBATCH --output=%x-%A_%a.out
#SBATCH --array=0-3
#SBATCH --open-mode=append
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=USR2@120
set -euo pipefail
# Slurm runs a copy of this script from its spool: the project is where it was submitted.
project=${SLURM_SUBMIT_DIR:-$PWD}
[[ -f $project/launch.py ]] || { echo "error: there is no launch.py in $project: submit from its folder" >&2; exit 2; }
# shellcheck source=slurm/setup.sh
source "$project/slurm/setup.sh"
exec python slurm/job.py tune "$@"
