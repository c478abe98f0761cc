"""Compares the peak memory of a whole training process with that of a bare training step in a process of its own.

    python benchmarks/memory.py [--recipe original] [--data-dir DIR] [--max-minutes M]

On a CPU: the largest resident set that the system counted for each process (Linux and macOS). The training process is
`launch.py` on CIFAR-10, with validation, checkpoints and, where it is not stopped before, the test; the bare process
imports what the package imports, and does ten steps. On CUDA `bench --json` has the allocator's peak.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
BARE = """
import sys, torch, torchvision, accelerate
sys.path.insert(0, sys.argv[1])
from benchmarks.floor import twenty_lines
step = twenty_lines(*sys.argv[2:3], int(sys.argv[3]), sys.argv[4])
for _ in range(10):
    step()
"""


def peak_mib(command: list[str]) -> tuple[float, int]:
    """Run a command to its end; give its largest resident set in MiB, and its exit code."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), process.returncode


def main() -> int:
    """Print both peaks and their difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="original")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--max-minutes", default="600")
    typed = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from cifar_dist.config.recipe import read_recipe, resolve_recipe

    recipe = resolve_recipe(read_recipe(typed.recipe))
    bare, _ = peak_mib(
        [sys.executable, "-c", BARE, str(ROOT), recipe.stem, str(recipe.global_batch_size), typed.precision]
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "launch.py", "--recipe", typed.recipe, "--data-dir", str(typed.data_dir.absolute())]
        command += ["--run-dir", f"{folder}/run", "--epochs", "1", "--precision", typed.precision, "--quiet"]
        whole, code = peak_mib([*command, "--max-minutes", typed.max_minutes])
    how = {0: "one epoch and the test", 75: f"stopped and saved after {typed.max_minutes} minutes"}.get(code, "FAILED")
    print(
        f"{typed.recipe}, batch {recipe.global_batch_size}, precision {typed.precision}: bare step {bare:,.0f} MiB,"
        f" whole training process {whole:,.0f} MiB ({how}): {whole - bare:+,.0f} MiB"
    )
    return 0 if code in (0, 75) else 1


if __name__ == "__main__":
    sys.exit(main())
