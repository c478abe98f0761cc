#!/usr/bin/env bash
# Run the tests in unusual surroundings, as root on Linux: tests/environments.sh [pytest's options, such as --all]
# 1. another user without a home, a terminal or a network, a checkout path with a space and a non-ASCII letter, and
#    variables of other launchers; 2. one core, the files in random order.
# The user `nobody` must be able to read the Python that is active.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v python)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
clone="$folder/a b é"
git clone -q "$checkout" "$clone"
mkdir "$folder/tmp" "$folder/home"
chown -R nobody "$clone" "$folder/tmp"
chmod 755 "$folder" && chmod 555 "$folder/home"

unusual=(
  HOME="$folder/home" TMPDIR="$folder/tmp" TERM=dumb LC_ALL=C PYTHONWARNINGS=default
  MPLBACKEND=module://matplotlib_inline.backend_inline OMP_NUM_THREADS=7
  WORLD_SIZE=4 RANK=3 LOCAL_RANK=3 LOCAL_WORLD_SIZE=4 MASTER_ADDR=nowhere.invalid MASTER_PORT=1
  SLURM_JOB_ID=7 SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=1 SLURM_STEP_ID=0 SLURM_JOB_NUM_NODES=2
  ACCELERATE_MIXED_PRECISION=fp16 ACCELERATE_USE_CPU=false ACCELERATE_USE_FSDP=true
)
echo "as another user, with ${unusual[*]}"
# shellcheck disable=SC2016  # expanded by the inner shell
unshare --net bash -c '
  ip link set lo up
  cd "$1" && shift
  exec setsid --wait setpriv --reuid=nobody --regid=nogroup --clear-groups env "$@" </dev/null
' - "$clone" "${unusual[@]}" "$python" -m pytest -q -p no:cacheprovider "$@"

echo "on one core, in random order"
cd "$checkout"
git ls-files 'tests/**/test_*.py' 'tests/test_*.py' | shuf |
  xargs taskset --cpu-list "$(taskset -cp $$ | sed 's/.*: *//; s/[,-].*//')" "$python" -m pytest -q -x -p no:randomly "$@"
