"""Compare the epoch losses of a run of `original` with those that the original script printed.

    python launch.py --data-dir DIR --recipe original --epochs 5 --run-dir RUN
    python benchmarks/fidelity.py RUN

Prints the losses of docs/accuracy.md, and exits with 1 where an epoch is more than 0.06 away from the printed loss.
"""

import argparse
import json
import sys
from pathlib import Path

PRINTED = (1.806, 1.520, 1.372, 1.244, 1.159)
"""Average losses of epochs 1 to 5, as the script's author printed them (on a Mac's MPS)."""
TOLERANCE = 0.06


def main() -> int:
    """Print the table; give the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    run = parser.parse_args().run
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    far = 0
    print("| epoch | the script printed | this launcher | difference | seconds |\n|---|---|---|---|---|")
    for printed, record in zip(PRINTED, records, strict=False):
        difference = record["train_loss"] - printed
        far += abs(difference) > TOLERANCE
        columns = (record["epoch"], f"{printed:.3f}", f"{record['train_loss']:.3f}", f"{difference:+.3f}")
        print("| " + " | ".join(map(str, columns)) + f" | {record['epoch_seconds']:.0f} |")
    test = summary["test"]
    print(f"\n{summary['device']}, precision {summary['precision']}, {summary['num_threads']} threads;", end=" ")
    print(f"test accuracy {test['top1']:.2%} after {summary['epochs']} epochs")
    if len(records) < len(PRINTED):
        print(f"error: {run} has {len(records)} epochs, and {len(PRINTED)} are compared", file=sys.stderr)
        return 2
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
