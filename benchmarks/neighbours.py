"""Measures the training loop beside busy programs, with the threads that are chosen and with fixed numbers, in turns.

    python benchmarks/neighbours.py [--recipe original] [--seconds 5] [-n 5] [--neighbours 0 1 2 3] [--threads 1 2]

A neighbour is a Python process that computes all the time. Each measurement is a `bench` of its own. Prints a Markdown
table: the median of the training loop's images per second, in brackets the smallest and the largest.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path

LAUNCH = Path(__file__).parent.parent / "launch.py"
BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): sum(range(100_000))"
"""Ends by itself if this process is killed."""
CHOSEN = 0
"""Stands for no typed number of threads."""


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Keep `count` CPUs busy in the context."""
    command = [sys.executable, "-c", BUSY, str(os.getpid())]
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen(command))
            stack.callback(process.kill)
        yield


def measure(typed: argparse.Namespace, precision: str, threads: int) -> tuple[float, int]:
    """Return images per second and the number of threads of one `bench`."""
    environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if threads != CHOSEN:
        environ["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        options = ["--recipe", typed.recipe, "--seconds", str(typed.seconds), "--precision", precision]
        command = [sys.executable, str(LAUNCH), "bench", *options, "--json", str(path)]
        subprocess.run(command, env=environ, check=True, stdout=subprocess.DEVNULL)
        result = json.loads(path.read_text())
    return result["loop_images_per_second"], result["num_threads"]


def spread(rates: list[float]) -> str:
    """Return the median, the smallest and the largest in words."""
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="original")
    parser.add_argument("--seconds", type=float, default=5, help="of the training loop in each measurement")
    parser.add_argument("-n", type=int, default=5, help="measurements of each kind")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="fixed numbers beside the chosen one")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "no"])
    typed = parser.parse_args()
    rates, chosen = defaultdict[tuple[str, int, int], list[float]](list), defaultdict[tuple[str, int], list[int]](list)
    for number, count, precision in product(range(typed.n), typed.neighbours, typed.precisions):
        kinds = [CHOSEN, *typed.threads]
        with neighbours(count):
            for threads in reversed(kinds) if number % 2 else kinds:
                rate, used = measure(typed, precision, threads)
                rates[precision, count, threads].append(rate)
                if threads == CHOSEN:
                    chosen[precision, count].append(used)
                what = f"{number + 1}: {count} busy, {precision}, threads {used}"
                print(f"{what}: {rate:,.0f}", file=sys.stderr, flush=True)
    fixed = " | ".join(f"OMP_NUM_THREADS={threads}" for threads in typed.threads)
    print(f"| precision | neighbours | chosen threads | images/s as chosen | {fixed} | chosen / best fixed |")
    print("|---" * (5 + len(typed.threads)) + "|")
    for precision, count in product(typed.precisions, typed.neighbours):
        best = max(statistics.median(rates[precision, count, threads]) for threads in typed.threads)
        cells = [spread(rates[precision, count, threads]) for threads in (CHOSEN, *typed.threads)]
        used = ", ".join(map(str, chosen[precision, count]))
        ratio = statistics.median(rates[precision, count, CHOSEN]) / best
        print(f"| {precision} | {count} | {used} | {' | '.join(cells)} | {ratio:.2f} |")
    print(f"\nn = {typed.n}, {os.cpu_count()} CPUs, --recipe {typed.recipe}, {typed.seconds:g} s each")


if __name__ == "__main__":
    main()
