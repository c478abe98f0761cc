# shellcheck shell=bash
# What the scripts of this folder share; they source it with `project` set. It sets `step`, the command that starts
# launch.py in all processes of the job. docs/slurm.md has its settings.
# shellcheck disable=SC2034,SC2154 # set there, used there

fail() { echo "error: $*" >&2; exit 2; }

cd "$project" || fail "cannot enter $project"

activate=${CIFAR_DIST_ACTIVATE:-.venv/bin/activate}
if [[ -f $activate ]]; then
  set +u # such files use variables that are not set
  # shellcheck disable=SC1090
  source "$activate"
  set -u
elif [[ -n ${CIFAR_DIST_ACTIVATE-} ]]; then
  fail "there is no $activate: CIFAR_DIST_ACTIVATE names the file that activates the environment"
fi

# A task for each GPU of a node, else one a node; a typed number of tasks wins. srun is told all of it, and the CPUs: by
# itself it would start what was typed for sbatch, which for `--gpus-per-node=8` alone is one task with one CPU a node.
count_gpus() { # of `6`, `a100:4` or `a100:4,h100:2`
  local each total=0
  for each in ${1//,/ }; do total=$((total + ${each##*:})); done
  echo "$total"
}
nodes=${SLURM_JOB_NUM_NODES:-1}
node_cpus=${SLURM_CPUS_ON_NODE:-1}
per_node=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
even=yes
if [[ -z ${SLURM_NTASKS_PER_NODE-} && ${SLURM_NTASKS:-1} -gt 1 ]]; then # --ntasks=N: Slurm lays them out
  even=no layout=(--ntasks="$SLURM_NTASKS") cpus=${SLURM_CPUS_PER_TASK:-1}
elif [[ -z ${SLURM_NTASKS_PER_NODE-} && -n ${SLURM_GPUS-} ]]; then # --gpus=N: some nodes may have more than others
  even=no layout=(--ntasks="$(count_gpus "$SLURM_GPUS")" --gpus-per-task=1) cpus=$((node_cpus / per_node))
else
  layout=(--nodes="$nodes" --ntasks="$((nodes * per_node))" --ntasks-per-node="$per_node")
  cpus=$((node_cpus / per_node))
fi
((cpus > 0)) || { cpus=1 && layout+=(--overcommit); } # more tasks than CPUs
unset SLURM_CPUS_PER_TASK SLURM_CPUS_PER_GPU            # srun would weigh them against what it is told

# The processes meet at the first node. Without scontrol, launch.py reads the node list itself.
host=$(scontrol show hostnames "${SLURM_JOB_NODELIST-}" 2>/dev/null | head -n 1) || true
# Jobs on one node want different ports; those from 32768 on may be in use by connections that go out.
port=$((12000 + ${SLURM_JOB_ID:-0} % 20000))
if [[ -n $host ]]; then export MASTER_ADDR=$host MASTER_PORT=$port; fi

export PYTHONUNBUFFERED=1
per_task=(srun "${layout[@]}" --cpus-per-task="$cpus" --kill-on-bad-exit=1)
per_machine=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$node_cpus" --kill-on-bad-exit=1)
case ${CIFAR_DIST_LAUNCHER:-srun} in
  srun) step=("${per_task[@]}" python launch.py) ;; # each process is a task, and gets every signal itself
  torchrun | accelerate)
    [[ $even == yes ]] || fail "$CIFAR_DIST_LAUNCHER starts equally many processes a node: type --ntasks-per-node"
    [[ -n $host ]] || fail "$CIFAR_DIST_LAUNCHER needs scontrol to find the first node"
    # The agent hands on the signal that it gets, and waits half a minute; USR2 it would die of.
    export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2
    ;;&
  torchrun)
    step=("${per_machine[@]}" torchrun --nnodes="$nodes" --nproc-per-node="$per_node" --rdzv-id="$SLURM_JOB_ID"
      --rdzv-backend=c10d --rdzv-endpoint="$host:$port" launch.py)
    ;;
  accelerate)
    # shellcheck disable=SC2016 # the task itself knows its node's number
    step=("${per_machine[@]}" bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' bash
      --multi_gpu --num_machines "$nodes" --num_processes "$((nodes * per_node))" --mixed_precision no
      --dynamo_backend no --main_process_ip "$host" --main_process_port "$port" launch.py)
    ;;
  *) fail "CIFAR_DIST_LAUNCHER must be srun, torchrun or accelerate, not $CIFAR_DIST_LAUNCHER" ;;
esac
