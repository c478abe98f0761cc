"""Trains a programme of recipes, run by run, and keeps what came of each in a table that can be committed.

    python benchmarks/accuracy.py run PROGRAMME --data-dir DIR [--minutes M] [--only ROW ...] [--seeds N ...]
    python benchmarks/accuracy.py time PROGRAMME [--only ROW ...] [--seconds S]
    python benchmarks/accuracy.py table PROGRAMME

A programme (benchmarks/programmes/*.yaml) is a list of rows: a name, a recipe, what is `set` otherwise, how many
`seeds` (0, 1, ...), and perhaps an Accelerate `config` and a `change` (benchmarks/changes.py). Its rows are for tuning
(`test: false`: the validation split decides, and what the test images say is not kept) or for the table (`test: true`:
trained on all images, the last weights, the test images used once).

`run` appends a line to benchmarks/results/PROGRAMME.jsonl as soon as a run ends, and does no run again that has a line
there with the same recipe: stopped at any moment, it goes on, on this machine or on another. With `--minutes` it stops
(and saves the run in progress) after so long, and ends with 75 where something is left. `--jobs` trains several at
once, for which a GPU has room, most of all under CUDA MPS; each line says how many (`at_once`), as their times mean
little.

`time` measures each row's loop against the original script's, in turns, on a machine that does nothing else, and gives
the whole recipe's time in epochs of the script (`script_epochs`): so it can be compared between machines.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.changes import CHANGES
from cifar_dist.config.errors import EXIT_INTERRUPTED
from cifar_dist.config.provenance import git_commit, package_versions
from cifar_dist.config.recipe import Recipe, read_recipe, recipe_to_mapping, resolve_recipe
from cifar_dist.config.schema import nested

ROOT = Path(__file__).parent.parent
SCRIPT_BATCH = 128


@dataclass(frozen=True, kw_only=True)
class Row:
    """A recipe to be trained with several seeds."""

    name: str
    recipe: str
    settings: dict[str, Any]
    seeds: int
    test: bool
    config: str | None
    change: str | None

    def resolved(self, seed: int) -> Recipe:
        """Give the whole recipe of a run."""
        protocol = {"validation_size": 0, "selection": "last"} if self.test else {"selection": "last"}
        base = self.recipe if not self.recipe.endswith(".yaml") else str(ROOT / self.recipe)
        return resolve_recipe(read_recipe(base), protocol, {**self.settings, "seed": seed})

    def digest(self, seed: int) -> str:
        """Give letters that tell this run from any other."""
        return digest(self.resolved(seed)) + ("" if self.change is None else f"-{self.change.replace(' ', '-')}")


def digest(recipe: Recipe) -> str:
    """Give a few letters that tell this recipe from any other, and stay when a field is added that is off in it."""
    values = recipe_to_mapping(recipe)
    if recipe.image_size_schedule is not None:  # in pixels, as it was when the first results were recorded
        values["image_size_schedule"] = [[round(s * recipe.image_size), end] for s, end in recipe.image_size_schedule]
    if recipe.validation_size == "auto":  # likewise
        values["validation_size"] = 5000
    text = json.dumps(switched_on(values), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


NEUTRAL = {"batch_norm_scale": True, "head_scale": 1.0, "orthogonalization_steps": 5}
"""The values at which newer fields change nothing."""


def switched_on(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is null, zero, false, none or neutral."""
    inner = {key: switched_on(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in inner.items() if value and value not in ("none", NEUTRAL.get(key))}


def read_programme(path: Path) -> list[Row]:
    """Read a programme's rows."""
    rows = yaml.safe_load(path.read_text())
    if not isinstance(rows, list):
        raise SystemExit(f"error: {path} is a recipe and no programme, which would be a list of rows")
    return [
        Row(
            name=row["name"],
            recipe=row["recipe"],
            settings=nested(row.get("set", {})),
            seeds=row.get("seeds", 1),
            test=row.get("test", True),
            config=row.get("config"),
            change=row.get("change"),
        )
        for row in rows
    ]


def hardware() -> str:
    """Name what computes."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    bf16 = [name for name, there in torch.cpu.get_capabilities().items() if "bf16" in name and there]
    return (
        f"{len(names)} cores of {names[0]}, {', '.join(bf16) or 'no bf16 instructions'}"
        if names
        else platform.machine()
    )


def where_from() -> dict[str, Any]:
    """Say what a line of results must say of its machine and versions."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "torch": package_versions()["torch"],
        "commit": git_commit(),
    }


def read_lines(results: Path) -> list[dict[str, Any]]:
    """Read the results so far."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def append_line(results: Path, line: dict[str, Any]) -> None:
    """Add a line to the results."""
    results.parent.mkdir(exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def runs_left(rows: list[Row], results: Path, seeds: list[int] | None) -> Iterator[tuple[Row, int]]:
    """Give the runs that have no line yet, first all first seeds; of these seeds alone where there are some."""
    done = {(line["name"], line["seed"], line["digest"]) for line in read_lines(results) if "seed" in line}
    for seed in seeds or range(max(row.seeds for row in rows)):
        for row in rows:
            if seed < row.seeds and (row.name, seed, row.digest(seed)) not in done:
                yield row, seed


def run(rows: list[Row], results: Path, typed: argparse.Namespace) -> int:
    """Do what is left of the runs; give the exit code."""
    until = time.monotonic() + 60 * typed.minutes
    left = list(runs_left(rows, results, typed.seeds))
    if typed.jobs > 1:
        with ThreadPoolExecutor(typed.jobs) as pool:
            codes = set(pool.map(lambda one: run_apart(*one, results, typed, until), left))
        failures = codes - {0, EXIT_INTERRUPTED}  # they count before what is only unfinished
        return failures.pop() if failures else max(codes, default=0)
    for row, seed in left:
        recipe = row.resolved(seed)
        folder = typed.work / f"{typed.programme.stem}-{row.name.replace(' ', '-')}-seed{seed}-{row.digest(seed)}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_to_mapping(recipe)))
        minutes = (until - time.monotonic()) / 60
        if minutes < 0.5:
            return EXIT_INTERRUPTED
        print(f"== {row.name}, seed {seed}", flush=True)
        command = ["--recipe", str(folder / "recipe.yaml"), "--run-dir", str(folder / "run"), "--resume"]
        command += ["--data-dir", str(typed.data_dir), "--max-minutes", f"{minutes:.2f}", *typed.launcher]
        command += ["--config", str(ROOT / row.config)] if row.config else []
        with CHANGES[row.change]():
            code = launch(*command)
        if code:
            return code
        append_line(results, outcome(row, seed, folder, typed))
    return 0


def run_apart(row: Row, seed: int, results: Path, typed: argparse.Namespace, until: float) -> int:
    """Do one of the runs in a process of its own; give its exit code."""
    minutes = max(0.0, (until - time.monotonic()) / 60)
    command = [sys.executable, __file__, "run", str(typed.programme), "--only", row.name, "--seeds", str(seed)]
    command += ["--results", str(results), "--data-dir", str(typed.data_dir), "--work", str(typed.work)]
    command += ["--minutes", str(minutes), "--at-once", str(typed.jobs), *typed.launcher]
    return subprocess.run(command, check=False).returncode


def launch(*arguments: str) -> int:
    """Do what launch.py does with these arguments, in this process: on a GPU a run takes less time than the imports."""
    from cifar_dist.cli import main as launch_main

    return launch_main(arguments)


def outcome(row: Row, seed: int, folder: Path, typed: argparse.Namespace) -> dict[str, Any]:
    """Give the line of a run that has ended."""
    summary = json.loads((folder / "run" / "summary.json").read_text())
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    line = {
        "name": row.name,
        "seed": seed,
        "digest": row.digest(seed),
        "test": row.test,
        "at_once": typed.at_once,
        **{key: summary[key] for key in ("status", "epochs", "train_seconds", "device", "precision")},
        "val_acc": records[-1]["val_acc"],
        "train_loss": records[-1]["train_loss"],
        **where_from(),
    }
    if row.test:
        mirrored = folder / "mirror.json"
        if launch("eval", "--ckpt", str(folder / "run"), "--tta", "mirror", "--json", str(mirrored)):
            raise SystemExit(f"error: {folder / 'run'} could not be evaluated")
        line |= {
            "plain": summary["test"]["top1"],
            "mirror": json.loads(mirrored.read_text())["top1"],
            "per_class": summary["test"]["per_class_accuracy"],
        }
    return line


def measure(rows: list[Row], results: Path, typed: argparse.Namespace) -> int:
    """Time each row's loop at each of its image sizes against the script's epoch, in turns."""
    from benchmarks.baselines import ScriptLoop, fair_seconds_of
    from cifar_dist.commands.bench import alternate
    from cifar_dist.config.accelerate_config import AccelerateConfig
    from cifar_dist.config.plan import make_plan
    from cifar_dist.config.world import World
    from cifar_dist.model.networks import build_network
    from cifar_dist.run.results import Observer
    from cifar_dist.runtime.distributed import connect, start
    from cifar_dist.training.measure import endless_steps, random_dataset
    from cifar_dist.training.setup import build_trainer

    config = AccelerateConfig()
    with connect(World(), config) as ranks:
        runtime = start(ranks, config, requested_precision=typed.precision, doing="measuring")
        for row in rows:
            recipe = row.resolved(0)
            dataset = random_dataset(32, recipe.global_batch_size)
            images = dataset.train
            model = build_network(Recipe.load("original"), 10)
            other = ScriptLoop(model, images.images, images.labels, batch_size=SCRIPT_BATCH, device=runtime.device)
            total, parts, begun = 0.0, [], 0.0
            for share, end in recipe.image_size_schedule or ((1.0, 1.0),):
                side = round(share * recipe.image_size)
                endless = {"epochs": 1_000_000, "validation_size": 0, "image_size": side, "image_size_schedule": None}
                one = resolve_recipe(recipe_to_mapping(recipe), endless)
                plan = make_plan(one, world_size=1, sizes=dataset.sizes, device_type=runtime.device.type)
                loop = endless_steps(build_trainer(one, plan, dataset, runtime, Observer()))
                with CHANGES[row.change]():
                    rounds = alternate([loop, other], 1, typed.seconds, runtime, timer=fair_seconds_of)
                # Seconds an image of ours over those of the script, in each round.
                ratios = [theirs * SCRIPT_BATCH / (ours * recipe.global_batch_size) for ours, theirs in rounds]
                rate = recipe.global_batch_size * statistics.median(ours for ours, _ in rounds)
                parts.append({"side": side, "images_per_second": rate, "ratios": ratios})
                total += recipe.epochs * (end - begun) * statistics.median(ratios)
                begun = end
            line = {
                "name": row.name,
                "timed": row.digest(0),
                "script_epochs": total,
                "parts": parts,
                "precision": runtime.precision,
                **where_from(),
            }
            append_line(results, line)
            print(f"{row.name}: {total:.2f} script epochs", flush=True)
    return 0


def table(rows: list[Row], results: Path) -> int:
    """Print the results in Markdown: means on each machine, and the standard error where there are several seeds."""
    lines = read_lines(results)
    columns = {"plain": "plain", "mirror": "mirror"} if any(row.test for row in rows) else {}
    columns |= {} if all(row.test for row in rows) else {"val_acc": "validation"}
    heads = ["row", "n", *columns.values(), "script epochs", "train seconds, alone", "machine"]
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for row in rows:
        digests = {row.digest(seed) for seed in range(row.seeds)}
        done = [line for line in lines if line["name"] == row.name and line.get("digest") in digests]
        times = [line for line in lines if line.get("timed") == row.digest(0)]
        for machine in sorted({line["hardware"] for line in done}) or [""]:
            here = [line for line in done if line["hardware"] == machine]
            cells = [row.name, str(len(here))]
            cells += [mean([line[key] for line in here if line.get(key) is not None]) for key in columns]
            cells += [", ".join(f"{each['script_epochs']:.1f} ({each['precision']})" for each in times)]
            alone = [line["train_seconds"] for line in here if line.get("at_once", 1) == 1]
            cells += [f"{statistics.mean(alone):.0f} (n = {len(alone)})" if alone else "", machine]
            print("| " + " | ".join(cells) + " |")
    return 0


def mean(values: list[float]) -> str:
    """Give the mean in percent, with its standard error."""
    if not values:
        return ""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.2%}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2%}{error}"


def main() -> int:
    """Do what is asked; give the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "time", "table"))
    parser.add_argument("programme", type=Path)
    parser.add_argument("--only", nargs="+", metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: all that the programme has")
    parser.add_argument("--jobs", type=int, default=1, help="how many to train at once (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=1, help=argparse.SUPPRESS)  # what `--jobs` tells its processes
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("CIFAR_DIST_TEST_DATA", "data")))
    parser.add_argument(
        "--work", type=Path, default=Path("runs/accuracy"), help="where the runs are (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/PROGRAMME.jsonl")
    parser.add_argument("--minutes", type=float, default=1e5, help="stop and save after so long")
    parser.add_argument("--seconds", type=float, default=20, help="for each loop that is timed")
    parser.add_argument("--precision", default="auto", help="of the loops that are timed (default: %(default)s)")
    typed, typed.launcher = parser.parse_known_args()
    rows = read_programme(typed.programme)
    names = [row.name for row in rows]
    if unknown := set(typed.only or ()) - set(names):
        parser.error(f"{typed.programme} has no row {', '.join(sorted(unknown))} (rows: {', '.join(names)})")
    if typed.launcher and typed.action != "run":
        parser.error(f"unknown arguments: {' '.join(typed.launcher)}")
    rows = [row for row in rows if not typed.only or row.name in typed.only]
    results = typed.results or ROOT / "benchmarks" / "results" / f"{typed.programme.stem}.jsonl"
    if typed.action == "run":
        return run(rows, results, typed)
    return measure(rows, results, typed) if typed.action == "time" else table(rows, results)


if __name__ == "__main__":
    sys.exit(main())
