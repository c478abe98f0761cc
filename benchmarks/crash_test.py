"""Does a killed run lose anything? Kills runs by SIGKILL, goes on with them, and compares them with runs left alone.

    python benchmarks/crash_test.py [--runs 50] [--seed 0] [--out runs/crash] [--json FILE] [--table]

Runs of one and of two CPU processes take turns; of each kind one is left alone first. The others are killed after a
random time (`delay`), in the writing of a checkpoint (`writing`) or after a random one (`step`): a rank, the launcher,
or all processes at once. Each goes on by the same command until it ends by itself, and must then have the same bits.
Runs that have a line in results-SEED.jsonl in --out are not done again (after a change, name another --out); --table
shows them and does no more. One that failed leaves its folder and log, and makes the exit code 1. For Linux.
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package beside this file, where another one is installed too

from cifar_dist.run.checkpoint import load_checkpoint  # noqa: E402
from cifar_dist.run.directory import RunDirectory  # noqa: E402

# Mixed images, averaged weights and a best epoch that need not be the last: much that can be lost.
ARGUMENTS = """--dataset shapes --recipe original --epochs 3 --precision no --quiet --resume --set stem=small
 image_size=8 global_batch_size=256 validation_size=2500 early_stopping.enabled=false early_stopping.monitor=val_acc
 ema_decay=0.9 optimizer.nesterov=true optimizer.learning_rate=0.05 augmentation.mixup=0.5"""
STEPS = 30  # of the optimiser, with these arguments
KINDS = ["delay", "writing", "step"]
VICTIMS = {1: ["process"], 2: ["rank 0", "rank 1", "all", "launcher"]}
EXIT, REST, GONE, LAST, LINES = "exit code 0", "the rest ends", "no process left", "last.pt readable", "whole lines"
SAME = ["same last.pt", "same best.pt", "same metrics.jsonl", "same test result", "same files", "no temporary file"]
MAY_DIFFER = {"train_seconds", "epoch_seconds", "images_per_second", "data_dir"}


def flatten(value: Any, where: str = "") -> dict[str, Any]:
    """Give all values in plain containers by where they are, tensors as their bytes; times and folders are left out."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        parts = [flatten(part, f"{where}/{key}") for key, part in items if key not in MAY_DIFFER]
        return {name: leaf for part in parts for name, leaf in part.items()}
    return {where: (value.dtype, value.shape, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value}


def kill(processes: list[psutil.Process]) -> None:
    """Kill processes, some of which may be gone."""
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def find_victim(launcher: psutil.Popen, wish: str) -> tuple[str, list[psutil.Process]]:
    """Find the processes to kill; the launcher stands in for a rank that it has not started yet."""
    others = launcher.children(recursive=True)
    for one in others:
        with suppress(psutil.Error):
            if f"rank {one.environ().get('RANK')}" == wish:
                return wish, [one]
    return ("launcher" if "rank" in wish else wish), [launcher, *others] if wish == "all" else [launcher]


class Run(RunDirectory):
    """A run that is started, killed again and again, and looked at."""

    def __init__(self, path: Path, processes: int, every_steps: int, draw: random.Random) -> None:
        super().__init__(path)
        self.processes, self.every_steps, self.draw, self.log = processes, every_steps, draw, path.with_suffix(".log")
        self.step, self.seconds, self.kills, self.failures = 0, 0.0, [], {}
        kill(self.alive())  # what an earlier one of this name has left
        shutil.rmtree(path, ignore_errors=True)

    def go(self, kills: int) -> None:
        """Start and kill it as often as that, then let it end by itself."""
        kinds, begun, code = [*self.draw.choices(KINDS, k=kills), None], time.monotonic(), None
        try:
            while code is None:
                code = self._once(kinds.pop(0))
        finally:
            kill(self.alive())
        self.check(EXIT, code == 0, code)
        self.seconds = time.monotonic() - begun

    def check(self, name: str, fine: bool, what: object) -> None:
        """Note a failure where something is not fine."""
        if not fine:
            self.failures[name] = f"{self.failures.get(name, '')} {what}".strip()

    def alive(self) -> list[psutil.Process]:
        """Find its processes, also those that have lost their parents: their command lines name the folder."""
        return [one for one in psutil.process_iter(["cmdline"]) if str(self.path) in (one.info["cmdline"] or ())]

    def outcome(self) -> list[dict[str, Any]]:
        """Give what must be the same, as in SAME."""
        records = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        test = json.loads(self.summary.read_text())["test"]
        names = [str(file.relative_to(self.path)) for file in self.path.rglob("*")]
        files = [{name: "there" for name in names if name.endswith(".tmp") == temporary} for temporary in (False, True)]
        return [flatten(it) for it in (load_checkpoint(self.last), load_checkpoint(self.best), records, test, *files)]

    def _start(self) -> psutil.Popen:
        """Start it, or go on with it: the command is the same."""
        command = [sys.executable, str(ROOT / "launch.py"), "--config", str(ROOT / "accelerate_configs" / "cpu.yaml")]
        command += ["--num-processes", str(self.processes)] if self.processes > 1 else []
        command += ["--run-dir", str(self.path), "--checkpoint-every-steps", str(self.every_steps), *ARGUMENTS.split()]
        environ = os.environ | {"OMP_NUM_THREADS": "1"}  # the bits depend on the number of threads
        with self.log.open("ab") as log:
            return psutil.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log)

    def _once(self, kind: str | None) -> int | None:
        """Start the run and kill it at a moment of this kind; give its exit code, None where it must go on."""
        place, wish, left = self.draw.random(), self.draw.choice(VICTIMS[self.processes]), STEPS - self.step
        # Where in what is left of the run; starting and testing take about 0.4 of a whole one.
        seconds = kind and place * (0.4 + 0.6 * left / STEPS) * left_alone(self.path.parent, self.processes).seconds
        changes = place * max(1, left // self.every_steps) - (kind == "writing")
        (written, old), begun, process = self._traces(), time.monotonic(), self._start()
        seen = {written}
        while process.poll() is None:
            passed, (now, temporary) = time.monotonic() - begun, self._traces()
            seen.add(now)
            by_file = len(seen) - 1 > changes and (kind == "step" or temporary - old)
            if kind and (passed > seconds if kind == "delay" else by_file):
                break
            if passed > 1200:
                return 1  # it hangs
            time.sleep(0.001)
        else:
            return process.returncode
        time.sleep(max(0, self.draw.uniform(-0.03, 0.03)))  # half of them at once
        victim, targets = find_victim(process, wish)
        now, temporary = self._traces()
        kill(targets)
        psutil.wait_procs([process], timeout=60)
        self.check(REST, process.poll() is not None, f"{kind}, {victim}")
        self._look()
        facts = ["in a writing"] * bool(temporary - old) + ["before its first checkpoint"] * (now == written)
        self.kills.append([f"by {kind}", f"of {victim}, {self.processes}P", *facts])
        return 0 if process.poll() == 0 else None  # it may have been done already

    def _traces(self) -> tuple[int, set[Path]]:
        """Tell when the last checkpoint was written (0: never), and which temporary files are beside it."""
        written = self.last.stat().st_mtime_ns if self.last.exists() else 0
        return written, set(self.last.parent.glob("*.tmp"))

    def _look(self) -> None:
        """Check what is there after a kill: processes, the last checkpoint and the metrics."""
        # Seconds are enough, and what had not heard of it would itself end a run as short as these before long.
        before, end = self.step, time.monotonic() + left_alone(self.path.parent, self.processes).seconds / 3
        while (left := self.alive()) and time.monotonic() < end:
            time.sleep(0.05)
        self.check(GONE, not left, f"{len(left)} processes")
        kill(left)
        try:
            self.step = load_checkpoint(self.last)["step"] if before or self.last.exists() else 0
            self.check(LAST, self.step >= before, f"from step {before} back to {self.step}")
        except Exception as error:  # a damaged file makes it fail in any way
            self.check(LAST, False, error)
        text = self.metrics.read_bytes() if self.metrics.exists() else b""
        self.check(LINES, len(self.read_records()) == len(text.splitlines()) == text.count(b"\n"), text[-100:])


@cache
def left_alone(out: Path, processes: int) -> Run:
    """Do the run that nobody kills."""
    run = Run(out / f"alone-{processes}", processes, 1, random.Random(0))
    run.go(kills=0)
    assert not run.failures, f"see {run.log}"
    return run


def torture(out: Path, seed: int, number: int) -> dict[str, Any]:
    """Do one run, compare it, and print a line; give what is to be known of it."""
    draw, processes = random.Random(f"{seed}-{number}"), 1 + number % 2
    run = Run(out / f"run-{seed}-{number:03}", processes, draw.randint(1, 3), draw)
    alone = left_alone(out, processes)
    run.go(kills=draw.choices(range(1, 7), (25, 30, 22, 12, 7, 4))[0])  # 2.6, of which some come too late
    try:
        for name, mine, whole in zip(SAME, run.outcome(), alone.outcome(), strict=True):
            found = [key for key in mine | whole if mine.get(key) != whole.get(key)]
            run.check(name, not found, f"{len(found)} differ: {', '.join(found[:5])}")
    except Exception as error:  # a file that is missing or damaged
        run.check(SAME[0], False, error)
    if not run.failures:
        shutil.rmtree(run.path)
        run.log.unlink()
    same = "not bit-identical" if run.failures.keys() & {EXIT, *SAME[:4]} else "bit-identical"
    failed = "".join(f"\n  failed: {check}: {what}" for check, what in run.failures.items())
    print(f"run {number}: {'; '.join(map(' '.join, run.kills)) or 'no kill'}: {same}{failed}", flush=True)
    return {"run": number, "seconds": round(run.seconds, 1), "kills": run.kills, "failures": run.failures}


def main() -> int:
    """Do the runs that are not done yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/crash"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"results-{arguments.seed}.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for number in range(len(results), 0 if arguments.table else arguments.runs):
        results.append(torture(out, arguments.seed, number))
        with file.open("a") as lines:
            lines.write(json.dumps(results[-1]) + "\n")
    kills = Counter(label for result in results for labels in result["kills"] for label in ("", *labels))
    failures = Counter(check for result in results for check in result["failures"])
    rows = [("runs", len(results)), *((f"kills {label}".strip(), count) for label, count in sorted(kills.items()))]
    rows += [(f"failures: {check}", failures[check]) for check in (EXIT, REST, GONE, LAST, LINES, *SAME)]
    print("| | |\n|---|---|", *(f"| {name} | {count} |" for name, count in rows), sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
