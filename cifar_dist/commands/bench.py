"""`bench`: the training loop against the bare training step, in alternation, in one run."""

import io
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from cifar_dist.baselines import peer, script
from cifar_dist.baselines.bare import BareStep
from cifar_dist.config.errors import EXIT_DONE, UserError
from cifar_dist.config.loading import read_recipe, recipe_label, resolve_recipe
from cifar_dist.config.options import BenchOptions
from cifar_dist.config.plan import make_plan
from cifar_dist.config.recipe import Recipe
from cifar_dist.config.world import AccelerateConfig, World
from cifar_dist.data.dataset import Dataset, LabelledImages
from cifar_dist.display.progress import training_display
from cifar_dist.display.tables import format_bench, print_lines
from cifar_dist.model.optimizer import build_optimizer
from cifar_dist.model.resnet import build_resnet
from cifar_dist.runtime.distributed import Runtime, connect, start
from cifar_dist.training.checkpoint import write_atomically
from cifar_dist.training.engine import Trainer
from cifar_dist.training.metrics import RunningSums
from cifar_dist.training.setup import build_trainer

_NUM_IMAGES = 20_000
_ROUNDS = 8
_SLOWEST_WORKERS = 1_000
"""Images a second that the workers of the other loops prepare at least."""
_NOT_FOR_SPEED = {"validation_size": 0, "early_stopping": {"enabled": False}, "epochs": 1_000_000}


def run(options: BenchOptions, world: World, config: AccelerateConfig) -> int:
    """Measure as asked; give the exit code."""
    console = Console(quiet=world.rank > 0)
    if options.json is not None and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise UserError(f"--json {options.json} cannot be written: name a file in a folder that exists")
    recipe = resolve_recipe(read_recipe(options.recipe), _NOT_FOR_SPEED, options.assignments)
    with connect(world, config) as ranks:
        runtime = start(ranks, config, typed_precision=options.precision, doing="measuring")
        what = f"{recipe_label(options.recipe)}, stem {recipe.stem}, batch {recipe.global_batch_size}"
        processes = f"{world.size} process{'es' if world.size > 1 else ''}"
        for line in (*runtime.outlook.notes, f"{what}, {processes}, {runtime.outlook.line}"):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        result = _measure(recipe, runtime, options.seconds)
    print_lines(console, format_bench(result), title="bench")
    if world.rank == 0 and options.json is not None:
        text = json.dumps(result, allow_nan=False) + "\n"
        write_atomically(options.json, lambda file: file.write(text.encode()))
    return EXIT_DONE


def _measure(recipe: Recipe, runtime: Runtime, seconds: float) -> dict[str, Any]:
    """Measure each loop for `seconds`, in turns, and give what `--json` writes."""
    dataset = _random_dataset(recipe.image_size)
    plan = make_plan(recipe, world_size=runtime.world.size, sizes=dataset.sizes, device_type=runtime.device.type)
    # Drawn as for a user, on a terminal that nobody sees: the bars cost what they cost.
    display = training_display(Console(file=io.StringIO(), force_terminal=True), plan, "bench", quiet=False)
    with display:
        loop = _Loop(build_trainer(recipe, plan, dataset, runtime, display))
        bare = _bare_step(recipe, runtime, dataset)
        contenders = [_Contender("bare_step", bare), _Contender("loop", loop)]
        if runtime.world.size == 1:  # neither of the others has a share for a process
            contenders += _others(recipe, runtime, dataset)
        rounds = _alternate(contenders, recipe.global_batch_size, seconds, runtime)
        parts = _seconds_by_part(bare, loop.trainer, runtime)
    return {
        **_compared(contenders, rounds),
        "seconds_by_part": parts,
        "rounds": len(rounds),
        "device": runtime.device.type,
        "precision": runtime.precision,
        "num_threads": runtime.num_threads,
        "global_batch_size": recipe.global_batch_size,
        "world_size": runtime.world.size,
        "peak_memory_mib": runtime.peak_memory_mib(),
    }


@dataclass(frozen=True, slots=True)
class _Contender:
    """A loop, a step at a time."""

    name: str
    step: Callable[[], None]
    prefetched: int = 0
    """Batches that its workers prepare while another loop is measured: done before the clock starts."""


def _others(recipe: Recipe, runtime: Runtime, dataset: Dataset) -> list[_Contender]:
    """Give what others do, with the same model, batch and images."""
    train, batch = dataset.train, recipe.global_batch_size
    models = [build_resnet(recipe.stem, dataset.num_classes, seed=recipe.seed) for _ in range(2)]
    first = script.ScriptLoop(models[0], train.images, train.labels, batch_size=batch, device=runtime.device)
    second = peer.PeerLoop(models[1], train.images, train.labels, batch_size=batch)
    return [_Contender("script", first, script.PREFETCHED), _Contender("peer", second, peer.PREFETCHED)]


def _compared(contenders: list[_Contender], rounds: list[tuple[float, ...]]) -> dict[str, float | None]:
    """Give each loop's median rate, and ours over each of the others with its spread."""
    rates = {each.name: [one[i] for one in rounds] for i, each in enumerate(contenders)}
    result: dict[str, float | None] = {}
    for name in ("bare_step", "loop", "script", "peer"):
        result[f"{name}_images_per_second"] = statistics.median(rates[name]) if name in rates else None
    for name in ("bare_step", "script", "peer"):
        key = f"loop_over_{name.removesuffix('_step')}"
        ratios = [ours / theirs for ours, theirs in zip(rates["loop"], rates.get(name, []), strict=False)]
        result[key] = statistics.median(ratios) if ratios else None
        result[f"{key}_min"], result[f"{key}_max"] = (min(ratios), max(ratios)) if ratios else (None, None)
    return result


def _bare_step(recipe: Recipe, runtime: Runtime, dataset: Dataset) -> BareStep:
    """Build the floor; with several processes each does its share by itself and hears nothing of the others."""
    batch = recipe.global_batch_size // runtime.world.size
    device, layout = runtime.device, runtime.memory_format
    model = build_resnet(recipe.stem, dataset.num_classes, seed=recipe.seed)
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
    images = torch.rand(batch, 3, recipe.image_size, recipe.image_size).to(device, memory_format=layout)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}[runtime.precision]
    labels = dataset.train.labels[:batch].to(device)
    return BareStep(model, build_optimizer(model, recipe.optimizer), images, labels, dtype)


class _Loop:
    """Our own loop, a step at a time, epoch after epoch."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.epoch = 0
        self._steps: Iterator[int] = iter(())

    def __call__(self) -> None:
        if next(self._steps, None) is None:
            self.epoch += 1
            trainer = self.trainer
            trainer.observer.on_epoch_start(self.epoch, trainer.recipe.optimizer.learning_rate)
            trainer.state.step = (self.epoch - 1) * trainer.plan.steps_per_epoch
            trainer.state.sums.set(0, 0, 0)
            self._steps = trainer.steps(self.epoch)
            next(self._steps)


def _alternate(
    contenders: list[_Contender], batch_size: int, seconds: float, runtime: Runtime
) -> list[tuple[float, ...]]:
    """Run the loops in turns; give each round's images a second, in the order of `contenders`."""
    for contender in contenders:  # caches, allocators and kernels that are chosen at the first call
        _time(contender.step, 3 + contender.prefetched, runtime)
    # All processes must do the same number of steps: rank 0's clock counts.
    times = runtime.ranks.exchange([_time(each.step, 2, runtime) / 2 for each in contenders])[0]
    rounds = max(3, min(_ROUNDS, int(seconds / max(times))))
    counts = [max(1, round(seconds / rounds / step_seconds)) for step_seconds in times]

    def rate(contender: _Contender, count: int) -> float:
        """Give one loop's images a second in one round."""
        _time(contender.step, contender.prefetched, runtime)
        taken = _time(contender.step, count, runtime)
        if contender.prefetched:  # its workers shall not take the next one's time
            time.sleep(contender.prefetched * batch_size / _SLOWEST_WORKERS)
        return count * batch_size / taken

    return [
        tuple(rate(contender, count) for contender, count in zip(contenders, counts, strict=True))
        for _ in range(rounds)
    ]


def _time(action: Callable[[], object], count: int, runtime: Runtime) -> float:
    """Give the seconds that `count` calls take, the device's work included."""
    runtime.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        action()
    runtime.synchronize()
    return time.perf_counter() - started


def _seconds_by_part(bare: BareStep, trainer: Trainer, runtime: Runtime, *, count: int = 5) -> dict[str, float]:
    """Time the parts of a step one by one: seconds a step, the device waited for after each part."""
    batches, batch = trainer.batches, trainer.recipe.global_batch_size
    table, samples = batches.augmentation.draw_table(1, len(batches.data)), torch.arange(batch)
    images, labels = batches.data.images[:batch], batches.data.labels[:batch]
    pixels = batches.augmentation.apply(images, table[:batch])
    sums, logits = RunningSums(runtime.device), torch.zeros(batch, 10, device=runtime.device)
    loss = torch.zeros((), device=runtime.device)
    parts: dict[str, Callable[[], object]] = {
        "gather": lambda: (table[samples], batches.data.images[samples.to(images.device)]),
        "augmentation": lambda: batches.augmentation.apply(images, table[:batch]),
        "normalization": lambda: batches.normalize(pixels),
        "metrics": lambda: sums.add(loss, logits, labels),
        "progress": lambda: trainer.observer.on_step(1, None),
        "optimizer": bare.optimizer.step,
    }
    seconds = {"forward": 0.0, "backward": 0.0}
    for _ in range(count):
        results: list[torch.Tensor] = []
        seconds["forward"] += _time(lambda: results.append(bare.forward()), 1, runtime) / count  # noqa: B023
        seconds["backward"] += _time(lambda: results[0].backward(), 1, runtime) / count  # type: ignore[no-untyped-call]  # noqa: B023
    return {name: _time(action, count, runtime) / count for name, action in parts.items()} | seconds


def _random_dataset(size: int) -> Dataset:
    """Make images that nobody will learn from: how long a step takes does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (_NUM_IMAGES, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (_NUM_IMAGES,), generator=generator)
    part = LabelledImages(images=images, labels=labels)
    return Dataset(name="random", class_names=tuple("0123456789"), train=part, test=part)
