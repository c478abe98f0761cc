"""Does the number of processes change the training? Trains the same recipe in several worlds and compares the epochs.

    python benchmarks/invariance.py --data-dir DIR [--worlds 1 1:1 2] [--epochs 3] [--seed 0] [--out DIR]

A world is a number of CPU processes, with `:N` of N threads each. In float32 the order of a sum changes its last bits,
and training makes them grow, so that two runs of one process with other numbers of threads part as well: `1:1` is there
to show how far. (In float64 the worlds agree to 1e-8: tests/worlds/test_training.py.)
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

LAUNCH = Path(__file__).parent.parent / "launch.py"
AIM = {1: 0.002, 3: 0.01}
"""Epoch -> how far apart the losses were meant to be at most, relative to the first world's."""


def train(arguments: argparse.Namespace, world: str) -> list[dict]:
    """Train in a world of CPU processes, unless that was done already; give its records."""
    processes, _, threads = world.partition(":")
    run = arguments.out / f"seed{arguments.seed}-world{world.replace(':', '-threads')}"
    if not (run / "test_predictions.npz").exists():
        config = LAUNCH.parent / "accelerate_configs" / "cpu.yaml"
        command = [sys.executable, str(LAUNCH), "--config", str(config), "--num-processes", processes]
        command += ["--recipe", arguments.recipe, "--epochs", str(arguments.epochs), "--seed", str(arguments.seed)]
        command += ["--precision", "no", "--data-dir", str(arguments.data_dir), "--run-dir", str(run)]
        environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        subprocess.run(command, check=True, env=environ | ({"OMP_NUM_THREADS": threads} if threads else {}))
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--worlds", nargs="+", default=["1", "1:1", "2"])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", default="original")
    parser.add_argument("--out", type=Path, default=Path("runs/invariance"))
    arguments = parser.parse_args()
    records = [train(arguments, world) for world in arguments.worlds]
    first, *others = arguments.worlds
    print(f"| epoch | loss in world {first} | " + " | ".join(f"world {world}" for world in others) + " | aim |")
    print("|---" * (len(arguments.worlds) + 2) + "|")
    for epoch, row in enumerate(zip(*records, strict=True), start=1):
        loss, *theirs = [record["train_loss"] for record in row]
        cells = [f"{loss:.5f}", *(f"{other:.5f} ({other / loss - 1:+.3%})" for other in theirs)]
        print(f"| {epoch} | " + " | ".join(cells) + f" | {f'{AIM[epoch]:.1%}' if epoch in AIM else ''} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
