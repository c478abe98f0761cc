"""Measures the training loop on 1, 2, 4 and 8 GPUs, as many as there are, and prints the table of docs/benchmarks.md.

    python benchmarks/scaling.py OUT [--recipe standard] [--seconds 5]

Each row is a process of its own, and is skipped where its figures are in OUT already: what was measured stays measured
when the machine goes away. `--cpu N` measures processes on the CPU instead, up to N of them, to try it out.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def measure(out: Path, count: int, batch: int, group: int | None, typed: argparse.Namespace) -> dict:
    """Give one row's figures, measured now or before."""
    file = out / f"scaling-{count}-{batch}-{group or 'global'}.json"
    if not file.exists():
        config = file.with_suffix(".yaml")
        kind = "MULTI_GPU" if count > 1 else "NO"
        config.write_text(
            f"distributed_type: '{kind}'\nnum_processes: {count}\nuse_cpu: {str(bool(typed.cpu)).lower()}\n"
        )
        command = [sys.executable, "launch.py", "bench", "--config", str(config.absolute()), "--recipe", typed.recipe]
        command += ["--seconds", str(typed.seconds), "--json", str(file.absolute())]
        fields = [f"global_batch_size={batch}", f"batch_norm_group_size={group or 'null'}", *typed.set]
        subprocess.run([*command, "--set", *fields], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads(file.read_text())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", default="standard")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--cpu", type=int, default=0, metavar="N")
    parser.add_argument("--set", nargs="*", default=[], help="fields of the recipe, as for launch.py")
    parser.add_argument("--batches", type=int, nargs="*", default=[512, 4096])
    typed = parser.parse_args()
    typed.out.mkdir(parents=True, exist_ok=True)
    available = typed.cpu or torch.cuda.device_count()
    print("| processes | global batch | BatchNorm over | images/s | of one process | over the bare step |")
    print("|---|---|---|---|---|---|")
    for batch in typed.batches:
        alone = None
        for count in (1, 2, 4, 8):
            for group in (None, batch // 8):
                if count > available or (count == 1 and group):
                    continue
                result = measure(typed.out, count, batch, group, typed)
                rate = result["loop_images_per_second"]
                alone = alone or rate
                over = "the global batch" if group is None else f"groups of {group}"
                ratio = f"{result['loop_over_bare']:.2f}"
                print(f"| {count} | {batch} | {over} | {rate:,.0f} | x {rate / alone:.2f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
