#!/usr/bin/env bash
# Everything that needs a GPU, in one command, on a machine with one (or more) and a checkout of this project:
#
#   benchmarks/gpu.sh [OUT]          # figures and logs go to OUT (default: runs/gpu-<time>), which must be new
#
# Nothing is downloaded. CIFAR_DIST_TEST_DATA names the folder of the official CIFAR-10 files, where they are there.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${1:-runs/gpu-$(date +%Y%m%d-%H%M%S)}
mkdir -p "$(dirname "$out")" && mkdir "$out" || exit 2
export PYTHONPATH=$PWD
failed=0

python launch.py doctor ${CIFAR_DIST_TEST_DATA:+--data-dir "$CIFAR_DIST_TEST_DATA"} | tee "$out/doctor.txt"
python -m pytest -m gpu -p no:cacheprovider 2>&1 | tee "$out/tests.txt" || failed=1
for precision in no bf16 fp16; do
  for stem in imagenet cifar; do
    python launch.py bench --recipe original --set stem=$stem global_batch_size=512 --precision $precision \
      --seconds 5 --json "$out/bench-$stem-$precision.json" 2>&1 | tee "$out/bench-$stem-$precision.txt" || failed=1
  done
done
if [[ -n ${CIFAR_DIST_TEST_DATA:-} ]]; then
  python launch.py --data-dir "$CIFAR_DIST_TEST_DATA" --recipe original --epochs 5 --precision no \
    --run-dir "$out/fidelity" 2>&1 | tee "$out/fidelity.txt" || failed=1
  python benchmarks/fidelity.py "$out/fidelity" | tee "$out/fidelity.md" || failed=1
fi
exit $failed
