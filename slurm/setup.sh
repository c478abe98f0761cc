# shellcheck shell=bash
# The scripts of this folder source it, with `project` set: it enters the project and activates its environment.
# docs/slurm.md has its settings; job.py does what follows.
# shellcheck disable=SC2154 # set there

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
