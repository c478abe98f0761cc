#!/usr/bin/env bash
# Everything that needs a GPU, in one command, on a machine with one (or more) and a checkout of this project:
#
#   benchmarks/gpu.sh [OUT]          # figures and logs go to OUT (default: runs/gpu)
#
# What is done stays done: called again with the same OUT, it goes on with the rest. MINUTES (default: 600) says after how
# long no further step is begun; it then ends with 75, as there is something left. A step that failed is tried again.
# Several runs are trained at once, so that their starts and tests overlap, which needs CUDA MPS (nvidia-cuda-mps-control -d).
# Nothing is downloaded. CIFAR_DIST_TEST_DATA names the folder of the official CIFAR-10 files, where they are there.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${1:-runs/gpu}
mkdir -p "$out" || exit 2
export PYTHONPATH=$PWD
data=${CIFAR_DIST_TEST_DATA:-}
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
failed=0 left=0

# step NAME COMMAND...: run it once, its output in OUT/NAME.txt
step() {
  local name=$1
  shift
  [[ -e $out/$name.done ]] && return
  if ((SECONDS > 60 * ${MINUTES:-600})); then
    left=1
    return
  fi
  echo "== $name: $*"
  "$@" > >(tee -a "$out/$name.txt") 2>&1
  case $? in
    0) touch "$out/$name.done" ;;
    75) left=1 ;; # stopped and saved: the next call goes on with it
    *) failed=1 ;;
  esac
}

cp benchmarks/eager.yaml "$out/eager.yaml" # without it whole steps are replayed
sed "/^#/d; s/'NO'}/INDUCTOR}/" benchmarks/eager.yaml >"$out/INDUCTOR.yaml"

# train NAME ARGUMENTS...: a run on the official files; what became of it is in its metrics.jsonl and summary.json
train() {
  local name=$1
  shift
  [[ -n $data ]] && step "$name" python launch.py --data-dir "$data" --run-dir "$out/$name" --resume "$@"
}

# accuracy NAME PROGRAMME ARGUMENTS...: runs of a programme, each a line in benchmarks/results/PROGRAMME.jsonl, which are to
# be committed (docs/accuracy.md).
accuracy() {
  [[ -n $data ]] || return
  local minutes=$((${MINUTES:-600} - SECONDS / 60)) name=$1 programme=benchmarks/programmes/$2.yaml
  shift 2
  step "accuracy-$name" python benchmarks/accuracy.py run "$programme" "$@" --data-dir "$data" \
    --work "$out/accuracy" --minutes "$((minutes > 1 ? minutes : 1))" --quiet
}

# What is asked first of a machine that is there for half an hour: does it work, how near is the limit, what is learned.
step doctor python launch.py doctor ${data:+--data-dir "$data"}
step tests python -m pytest tests/gpu -p no:cacheprovider
accuracy alone gpu --only standard strong --seeds 0 1 2 # these give the times
step trace-standard python benchmarks/trace.py --recipe standard
step trace-standard-eager python benchmarks/trace.py --recipe standard --config "$out/eager.yaml"
step limit-standard python benchmarks/limit.py --recipe standard --precision bf16
accuracy tuning gpu-tuning --jobs 6
train epochs --recipe standard --epochs 4 --set validation_size=0 image_size_schedule=null augmentation.flip=random
for backend in INDUCTOR eager; do
  train "epochs-$backend" --config "$out/$backend.yaml" --recipe standard --epochs 4 \
    --set validation_size=0 image_size_schedule=null
done
accuracy short gpu --only strong standard zoo-26 zoo-80 plain original --jobs 6

for recipe in standard original; do
  step "bench-$recipe" python launch.py bench --recipe $recipe --seconds 10 --json "$out/bench-$recipe.json"
  for backend in INDUCTOR eager; do
    step "bench-$recipe-$backend" python launch.py bench --recipe $recipe --seconds 10 --config "$out/$backend.yaml" \
      --json "$out/bench-$recipe-$backend.json"
    step "trace-$recipe-$backend" python benchmarks/trace.py --recipe $recipe --config "$out/$backend.yaml"
  done
done
step limit-standard-compiled python benchmarks/limit.py --recipe standard --precision bf16 --compile
step limit-original python benchmarks/limit.py --recipe original --precision bf16 --compile
step trace-original python benchmarks/trace.py --recipe original
for batch in 256 1024; do
  step "limit-standard-$batch" python benchmarks/limit.py --recipe standard --precision bf16 --batch $batch --compile
done
step startup python benchmarks/startup.py --rounds 5
step scaling python benchmarks/scaling.py "$out/scaling"
train fidelity --recipe original --epochs 5 --precision no
[[ -n $data ]] && step fidelity-table python benchmarks/fidelity.py "$out/fidelity"
for precision in no bf16 fp16; do
  for stem in imagenet cifar; do
    step "bench-$stem-$precision" python launch.py bench --recipe original --set stem=$stem global_batch_size=512 \
      --precision $precision --seconds 5 --json "$out/bench-$stem-$precision.json"
  done
done
for recipe in standard original; do
  step "sweep-$recipe" python benchmarks/sweep.py --recipe $recipe --seconds 3 --json "$out/sweep-$recipe.json"
done

# shellcheck disable=SC2329  # called by step
seeds() {
  local pids=() code=0 seed
  for ((seed = 0; seed < gpus; seed++)); do
    CUDA_VISIBLE_DEVICES=$seed python launch.py --data-dir "$data" --recipe standard --seed "$seed" --quiet \
      --run-dir "$out/seed$seed" --resume &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=1; done
  python launch.py report "$out"/seed* && return "$code"
}
[[ -n $data ]] && ((gpus > 1)) && step seeds seeds

accuracy long gpu --only long --jobs 6
((left || failed)) || step accuracy-table python benchmarks/accuracy.py table benchmarks/programmes/gpu.yaml

((failed)) && exit 1
((left)) && exit 75
exit 0
