#!/usr/bin/env bash
# A Slurm cluster of two nodes on this machine, for the tests: real daemons, real signals, all in one folder.
#
#   cluster.sh install      install the programs from Debian's or Ubuntu's packages
#   cluster.sh up           start it and wait for its nodes; exits 3, with one line, where something is missing
#   cluster.sh down         kill its jobs and daemons, remove its cgroups and its folder
#   cluster.sh env          print the line that points a shell's sbatch, srun, ... at it
#   cluster.sh crash NODE   kill -9 a node's daemon and all that runs under it, as a power cut would
#   cluster.sh return NODE  boot that node again
#
# NODE is n1, n2 or the node's whole name. Partition `high` preempts `main`, the default, by requeue.
# Settings (= default):
#   TEST_CLUSTER_DIR             where everything is kept: an absolute path, short (it holds sockets), new to `up`
#   TEST_CLUSTER_CPUS=4          CPUs declared for each node, whatever the machine has
#   TEST_CLUSTER_GPUS=0          GPUs that each node pretends to have, so that --gpus-per-node is accepted
#   TEST_CLUSTER_HOSTNAMES=auto  yes: a hostname for each node (needs unshare); no: addresses are the nodes' names
#   TEST_CLUSTER_PROCTRACK=auto  cgroup (needs cgroup v1's freezer) or linuxproc
#
# The folder's name is hashed into the nodes' names and addresses and the first job's number, and the ports are looked
# for, so that clusters do not meet. Outside its folder a cluster has only /sys/fs/cgroup/freezer/slurm_<node>.

set -euo pipefail
export LC_ALL=C PATH=$PATH:/usr/sbin:/sbin

GRACE_SECONDS=10         # from a preemption's SIGTERM to the kill, for which Slurm looks twice a minute only
KILL_SECONDS=10          # the same for a job that was cancelled or is out of time
NODE_TIMEOUT_SECONDS=30  # a node that is silent for so long is down
REQUEUE_DELAY_SECONDS=5  # Slurm's own default is 120
START_SECONDS=60         # the longest wait for a daemon or a node
FREEZER=/sys/fs/cgroup/freezer

die() { echo "cluster.sh: $2" >&2; exit "$1"; }

within() { # SECONDS COMMAND...: repeat the command until it succeeds
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < end)) || return 1
    sleep 0.1
  done
}

processes() { # LOG NODE...: the daemons, and the parents of job steps, that write LOG; all that the nodes' jobs started
  local pid node
  for pid in $(find /proc/[0-9]*/fd -lname "$DIR/log/$1" 2>/dev/null | cut -d/ -f3 | sort -u); do
    [[ $(cat "/proc/$pid/comm" 2>/dev/null) != @(slurm*|munged) ]] || echo "$pid"
  done
  for node in "${@:2}"; do
    grep -slzxF "SLURMD_NODENAME=$node" /proc/[0-9]*/environ | cut -d/ -f3 || true
    [[ ! -f $DIR/cgroup.conf ]] || find "$FREEZER/slurm_$node" -name cgroup.procs -exec cat {} + 2>/dev/null || true
  done
}

kill_all() { # LOG NODE...: what `processes` finds
  local pids
  pids=$(processes "$@")
  [[ -n $pids ]] || return 0
  # shellcheck disable=SC2086
  kill -9 $pids 2>/dev/null
  # What a suspended job runs dies only when it is thawed.
  find "${@/#/$FREEZER/slurm_}" -mindepth 2 -name freezer.state -exec sh -c 'echo THAWED >"$1"' - {} \; 2>/dev/null
  return 1
}

no_cgroups() { # NODE...: remove theirs
  find "${@/#/$FREEZER/slurm_}" -depth -type d -exec rmdir {} \; 2>/dev/null
  [[ ! -d $FREEZER/slurm_$1 && ! -d $FREEZER/slurm_$2 ]]
}

daemon() { # COMMAND...: start what goes into the background by itself, with a small environment
  (cd "$DIR" && env -i PATH="$PATH" HOME="${HOME:-/root}" LC_ALL=C "$@" </dev/null >>log/start.log 2>&1)
}

address() { echo "127.$((0x${1:0:2})).$((0x${1:2:2})).$2"; } # HASH NUMBER: of a node, on the loopback interface

free_ports() { # the first of three neighbours that nobody listens on, below those that the kernel gives away
  local used first port
  used=$(awk '{print $2}' /proc/net/tcp /proc/net/tcp6 2>/dev/null || true)
  while :; do
    first=$((10000 + RANDOM % 20000))
    for port in $first $((first + 1)) $((first + 2)); do
      [[ $used != *":$(printf %04X "$port")"* ]] || continue 2
    done
    echo "$first" && return
  done
}

configuration() { # HASH HOSTNAMES PROCTRACK NODE NODE: prints slurm.conf
  local port hostname=localhost node
  port=$(free_ports)
  cat <<CONF
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until its credentials have expired.
AuthInfo=socket=$DIR/munge.socket,cred_expire=$REQUEUE_DELAY_SECONDS
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/$3
TaskPlugin=task/none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# A preempted job gets the signal that it asked for by --signal.
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
FirstJobId=$((1000 + 0x$1 % 50000))
MinJobAge=3600
KillWait=$KILL_SECONDS
SlurmdTimeout=$NODE_TIMEOUT_SECONDS
MessageTimeout=30
BatchStartTimeout=30
# A node that was down because it was silent comes back by itself.
ReturnToService=1
# The declared CPUs and memory are believed.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs=$CPUS RealMemory=65536$( ((GPUS == 0)) || echo " Gres=gpu:$GPUS")
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE_SECONDS
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
CONF
  for node in "${@:4}"; do
    [[ $2 == no ]] || hostname=$node
    echo "NodeName=$node NodeHostname=$hostname NodeAddr=127.0.0.1 Port=$((port += 1))"
  done
}

start_node() { # NODE ARGUMENTS...
  local own=() before
  # shellcheck disable=SC2016
  local in_namespace='mount --bind hosts /etc/hosts && hostname "$1" && shift && exec "$@"'
  grep -q "NodeName=$1 NodeHostname=localhost" "$SLURM_CONF" ||
    own=(unshare --mount --uts sh -c "$in_namespace" sh "$1")
  before=$(started "$1")
  within 2 later_than "$before"
  mkdir -p "$DIR/spool/$1"
  daemon "${own[@]}" slurmd -f "$SLURM_CONF" -N "$@"
  within $START_SECONDS ready "$1" "$before" || die 1 "node $1 does not come up"
}
show() { timeout 10 scontrol show node -o "$1"; }
started() { show "$1" | grep -oP 'SlurmdStartTime=\K\S+'; }
later_than() { [[ $1 == None || $(date +%FT%T) > $1 ]]; }
ready() { # NODE BEFORE: it has registered since, and takes jobs
  [[ $(started "$1") != "$2" ]] || return 1
  [[ $(show "$1") != *" State=DOWN"* ]] || scontrol update NodeName="$1" State=RESUME || true
  show "$1" | grep -qE ' State=(IDLE|MIXED|ALLOCATED)(\+COMPLETING)? '
}

up_failed() {
  tail -n 8 "$DIR"/log/*.log >&2
  down
  die 1 "Slurm did not start; the ends of its logs are above"
}

up() {
  local program hash number names hostnames=$HOSTNAMES proctrack=$PROCTRACK
  for program in slurmctld slurmd srun sbatch scontrol munged; do
    command -v "$program" >/dev/null || die 3 "no $program here; '$0 install' installs Slurm"
  done
  ((UID == 0)) || die 3 "only root can start a cluster"
  [[ -z $(ls -A "$DIR" 2>/dev/null) ]] || die 2 "$DIR is not empty: choose another TEST_CLUSTER_DIR, or 'down' first"

  hash=$(sha256sum <<<"$DIR" | cut -c1-6)
  [[ $hostnames != auto ]] || hostnames=$(unshare --mount --uts echo yes 2>/dev/null || echo no)
  names=("c$hash-n1" "c$hash-n2")
  [[ $hostnames == yes ]] || names=("$(address "$hash" 1)" "$(address "$hash" 2)")
  if [[ $proctrack == auto ]]; then # no cgroups where none can be made, or where another cluster's have these names
    proctrack=cgroup
    mkdir "${names[@]/#/$FREEZER/slurm_}" 2>/dev/null && no_cgroups "${names[@]}" || proctrack=linuxproc
  fi

  mkdir -p "$DIR"/{log,state,spool}
  printf '%s\n' "${names[@]}" >"$DIR/nodes"
  trap up_failed EXIT
  chmod 755 "$DIR"
  (umask 077 && head -c 1024 /dev/urandom >"$DIR/munge.key")
  for number in 1 2; do echo "$(address "$hash" $number) ${names[number - 1]}"; done | cat - /etc/hosts >"$DIR/hosts"
  configuration "$hash" "$hostnames" "$proctrack" "${names[@]}" >"$SLURM_CONF"
  [[ $proctrack != cgroup ]] ||
    printf '%s\n' CgroupPlugin=cgroup/v1 CgroupMountpoint=/sys/fs/cgroup CgroupAutomount=no >"$DIR/cgroup.conf"
  for ((number = 0; number < GPUS; number++)); do
    ln -s /dev/null "$DIR/nvidia$number"
    echo "Name=gpu File=$DIR/nvidia$number Flags=nvidia_gpu_env" >>"$DIR/gres.conf"
  done
  daemon munged --force --key-file="$DIR/munge.key" --seed-file="$DIR/munge.seed" --socket="$DIR/munge.socket" \
    --pid-file="$DIR/munged.pid" --log-file="$DIR/log/munged.log"
  daemon slurmctld -f "$SLURM_CONF"
  within $START_SECONDS started "${names[0]}" >/dev/null 2>&1
  for number in 0 1; do start_node "${names[number]}"; done
  trap - EXIT
  echo "${names[*]} are up: proctrack/$proctrack, own hostnames: $hostnames"
}

down() {
  local nodes
  [[ -f $DIR/nodes && -d $DIR/spool ]] || die 0 "there is no cluster in $DIR"
  mapfile -t nodes <"$DIR/nodes"
  within 10 kill_all '*' "${nodes[@]}" || die 1 "these do not die: $(processes '*' "${nodes[@]}" | xargs)"
  [[ ! -f $DIR/cgroup.conf ]] || within 5 no_cgroups "${nodes[@]}" || die 1 "$FREEZER/slurm_* cannot be removed"
  rm -rf "$DIR"
}

install() {
  export RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive # RUNLEVEL=1: the packages start no daemons
  local get=(apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge)
  "${get[@]}" || { apt-get update && "${get[@]}"; }
}

case $#-${1:-} in
  1-install) install; exit ;;
  1-up | 1-down | 1-env | 2-crash | 2-return) ;;
  *) sed -n '4,9p' "$0" | cut -c3- >&2; exit 2 ;;
esac
[[ ${TEST_CLUSTER_DIR:-} == /* ]] || die 2 "TEST_CLUSTER_DIR must be an absolute path"
DIR=$(realpath -m "$TEST_CLUSTER_DIR")
CPUS=${TEST_CLUSTER_CPUS:-4} GPUS=${TEST_CLUSTER_GPUS:-0}
HOSTNAMES=${TEST_CLUSTER_HOSTNAMES:-auto} PROCTRACK=${TEST_CLUSTER_PROCTRACK:-auto}
export SLURM_CONF=$DIR/slurm.conf
if [[ $# == 2 ]]; then
  NODE=$(awk -v node="$2" '$0 == node || "n" NR == node' "$DIR/nodes")
  [[ -n $NODE ]] || die 2 "no node '$2' in $DIR"
fi

case $1 in
  up) up ;;
  down) down ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  crash) within 10 kill_all "slurmd-$NODE.log" "$NODE" ;;
  return)
    before=$(started "$NODE")
    start_node "$NODE" -b # as after a boot, so that the steps it had are not waited for
    # A second registration within the same second looks like a second boot, which takes it down again.
    within 3 later_than "$(date +%FT%T -d '1 second')"
    within $START_SECONDS ready "$NODE" "$before"
    ;;
esac
