#!/usr/bin/env bash
# Evaluates a run or a checkpoint, on as many processes as the job has.
#
#   sbatch slurm/eval.sh --ckpt runs/cifar-dist-1234 --json result.json
#
#SBATCH --job-name=cifar-dist-eval
#SBATCH --output=%x-%j.out
#SBATCH --time=00:30:00
set -euo pipefail
# Slurm runs a copy of this script from its spool: the project is where it was submitted.
project=${SLURM_SUBMIT_DIR:-$PWD}
[[ -f $project/launch.py ]] || { echo "error: there is no launch.py in $project: submit from its folder" >&2; exit 2; }
# shellcheck source=slurm/setup.sh
source "$project/slurm/setup.sh"
exec python slurm/job.py eval "$@"
