"""Does the number of processes change the training? Trains the same recipe in several worlds and compares the epochs.

    python benchmarks/invariance.py --data-dir DIR [--worlds 1 2] [--epochs 3] [--recipe original] [--out DIR]

In float32 the order of a sum changes its last bits, and training makes them grow: the first epochs agree closely, later
ones less and less. (In float64 they agree to 1e-8: tests/worlds/test_training.py.)
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

LAUNCH = Path(__file__).parent.parent / "launch.py"
ALLOWED = {1: 0.002, 3: 0.01}
"""Epoch -> how far the losses may be apart, relative to the first world's."""


def train(arguments: argparse.Namespace, world: int) -> list[dict]:
    """Train in a world of `world` CPU processes, unless that was done already; give its records."""
    run = arguments.out / f"world{world}"
    if not (run / "test_predictions.npz").exists():
        config = LAUNCH.parent / "accelerate_configs" / "cpu.yaml"
        command = [sys.executable, str(LAUNCH), "--config", str(config), "--num-processes", str(world)]
        command += ["--recipe", arguments.recipe, "--epochs", str(arguments.epochs), "--precision", "no"]
        command += ["--data-dir", str(arguments.data_dir), "--run-dir", str(run)]
        subprocess.run(command, check=True)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def main() -> int:
    """Print the table; 1 where the worlds are farther apart than they may be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--recipe", default="original")
    parser.add_argument("--out", type=Path, default=Path("runs/invariance"))
    arguments = parser.parse_args()
    records = [train(arguments, world) for world in arguments.worlds]
    names = [f"{world} process{'es' if world > 1 else ''}" for world in arguments.worlds]
    print("| epoch | " + " | ".join(f"loss, {name}" for name in names) + " | largest difference | allowed |")
    print("|---" * (len(names) + 3) + "|")
    apart = False
    for epoch, row in enumerate(zip(*records, strict=True), start=1):
        losses = [record["train_loss"] for record in row]
        difference = max(abs(loss / losses[0] - 1) for loss in losses)
        allowed = ALLOWED.get(epoch)
        apart |= allowed is not None and difference > allowed
        limit = "" if allowed is None else f"{allowed:.1%}"
        print(f"| {epoch} | " + " | ".join(f"{loss:.5f}" for loss in losses) + f" | {difference:.4%} | {limit} |")
    return int(apart)


if __name__ == "__main__":
    sys.exit(main())
