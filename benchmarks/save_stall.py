"""Times how long the training loop stands still while a checkpoint is written.

    python benchmarks/save_stall.py [--recipe standard] [--saves 20] [--dataset cifar10 --data-dir DIR] [--out DIR]

Trains as a user would, with a checkpoint after every second step, and times each save from the loop's side: what is
gathered, packed, written and synced. It is the largest save that there is: with best weights, and those new each time,
so that best.pt is written too. The first save is left out (the folder and torch's writer are new to it).
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from cifar_dist.cli import main as cifar_dist
from cifar_dist.training.state import Best, copy_weights
from cifar_dist.training.trainer import Trainer


class Clock:
    """Times saves and steps from outside, and ends the run when there are enough."""

    def __init__(self, saves: int) -> None:
        self.wanted, self.saves, self.steps, self.trainer = saves, [], [], None
        save, end = Trainer._save, Trainer._end_step

        def timed_save(trainer: Trainer) -> None:
            """Save as the largest checkpoint is saved, and end the run when there are enough."""
            weights = copy_weights(trainer.state.model)
            trainer.state.best = Best(epoch=len(self.saves), value=0, weights=weights, record={})
            begun = time.perf_counter()
            save(trainer)
            self.saves.append(time.perf_counter() - begun)
            if len(self.saves) > self.wanted:
                trainer.interrupt.requested = "SIGTERM"

        def timed_step(trainer: Trainer, epoch: int) -> None:
            """Note when a step is done."""
            end(trainer, epoch)
            self.trainer = trainer
            self.steps.append(time.perf_counter())

        Trainer._save, Trainer._end_step = timed_save, timed_step

    def step_seconds(self) -> float:
        """The median time of a step that has no save before it: every second one."""
        return statistics.median(b - a for a, b in zip(self.steps[2::2], self.steps[3::2], strict=False))


def main() -> int:
    """Print a row of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="standard")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--saves", type=int, default=20)
    parser.add_argument(
        "--out", type=Path, help="a folder on the disk to be measured (default: the temporary folder's)"
    )
    arguments = parser.parse_args()
    clock = Clock(arguments.saves)
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
        run = Path(folder) / "run"
        data = ["--dataset", arguments.dataset, "--data-dir", str(arguments.data_dir)]
        often = ["--run-dir", str(run), "--checkpoint-every-steps", "2", "--quiet"]
        cifar_dist(["--recipe", arguments.recipe, *data, *often])
        size = sum((run / "checkpoints" / name).stat().st_size for name in ("last.pt", "best.pt")) / 1e6
    stalls, plan = sorted(1000 * seconds for seconds in clock.saves[1:]), clock.trainer.plan
    epoch = clock.step_seconds() * plan.steps_per_epoch
    median = statistics.median(stalls)
    minute = max(60, median / 10)
    print("| recipe | last.pt, best.pt | stall: median (range) | n | epoch | of an epoch | of a run, default rhythm |")
    print("|---" * 7 + "|")
    print(
        f"| {arguments.recipe} | {size:.0f} MB | {median:.0f} ms ({stalls[0]:.0f}-{stalls[-1]:.0f}) | {len(stalls)} "
        f"| {epoch:.1f} s | {median / 10 / epoch:.2f} % | {median / 10 / minute:.2f} % |"
    )
    print(f"\n{os.cpu_count()} cores, {clock.trainer.runtime.compute.line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
