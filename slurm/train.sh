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

job=${SLURM_JOB_ID:-0}
name=$job # of an array's task: requeueing the number of its job would requeue all of its tasks
[[ -z ${SLURM_ARRAY_JOB_ID-} ]] || name=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
run_dir=runs/${SLURM_JOB_NAME:-cifar-dist}-$name
data_dir=data
arguments=()
while (($#)); do
  case $1 in
    --run-dir | --resume) if [[ ${2--} != -* ]]; then run_dir=$2 && shift; fi ;;
    --run-dir=* | --resume=*) run_dir=${1#*=} ;;
    --data-dir) data_dir=${2-} && arguments+=("$1" "${2-}") && shift ;;
    --data-dir=*) data_dir=${1#*=} && arguments+=("$1") ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
shown=$(scontrol show job -o "$name" 2>/dev/null) || true
echo "run directory $(realpath -m "$run_dir"), log $(sed -n 's/.* StdOut=\([^ ]*\).*/\1/p' <<<"$shown")"

if [[ -n ${CIFAR_DIST_STAGE-} ]]; then # a folder on each node's own disk
  # shellcheck disable=SC2016 # to be evaluated there
  srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task=1 \
    bash -c 'mkdir -p "$1" && cp -ru "$0"/cifar-*-* "$1"' "$data_dir" "$CIFAR_DIST_STAGE" ||
    fail "cannot copy $data_dir/cifar-* to $CIFAR_DIST_STAGE"
  arguments+=(--data-dir "$CIFAR_DIST_STAGE")
fi

as_it_was=$(stat -c %y "$run_dir/summary.json" 2>/dev/null) || true
told_to_end=no # scancel, the time limit, or a preemption after which Slurm requeues the job by itself
trap 'told_to_end=yes' TERM
"${step[@]}" ${arguments[@]+"${arguments[@]}"} --run-dir "$run_dir" --resume &
code=0
wait $! || code=$?
while kill -0 $! 2>/dev/null; do # it was the trap that ended the waiting
  code=0
  wait $! || code=$?
done

# What became of it is read in the run's own words: srun's code may be that of a process that it killed itself.
summary() { sed -n "s/^ *\"$1\": \"\{0,1\}\([a-z_0-9.]*\).*/\1/p" "$run_dir/summary.json" 2>/dev/null || true; }
status=$(summary status)
# The outcome of an earlier start, which this one, to train the run longer, did not come to replace.
if [[ $code != 0 && $status != interrupted && $status != running && -n $as_it_was &&
  $as_it_was == "$(stat -c %y "$run_dir/summary.json" 2>/dev/null)" ]]; then status=; fi
((code != 2)) || exit 2 # bad input
case $status in
  completed | early_stopped) exit 0 ;;
  diverged) exit 1 ;;
  '') ((code == 75)) || exit "$code" ;; # it never began, unless it was told to end before that
esac
# What was cancelled stays so, and Slurm requeues by itself what it preempts. A salloc shell is nobody's to requeue.
if [[ $told_to_end == yes || $shown != *BatchFlag=[1-9]* ]]; then exit "$code"; fi

# Interrupted, or killed with its node or by a lack of memory: again, but not for ever where nothing comes of it.
trained=$(summary train_seconds) restarts=0 before=
restarts_file=$run_dir/slurm-restarts
[[ ! -f $restarts_file ]] || read -r before restarts <"$restarts_file"
[[ $before == "${trained:-0}" ]] || restarts=0
if ((restarts >= 3)); then
  echo "error: not requeued: restarted $restarts times, and none of them trained any further" >&2
  exit 1
fi
mkdir -p "$run_dir" && echo "${trained:-0} $((restarts + 1))" >"$restarts_file"
echo "requeued: ${status:-not begun}, after ${trained:-0} s of training"
scontrol requeue "$name"
