"""`bench`: measure the training loop against the bare training step, in turns, and the parts of a step."""

import functools
import io
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.errors import EXIT_DONE
from cifar_dist.config.files import STANDARD_OUTPUT, write_json
from cifar_dist.config.options import BenchOptions
from cifar_dist.config.plan import make_plan
from cifar_dist.config.recipe import Recipe, describe_network, recipe_label
from cifar_dist.config.world import World
from cifar_dist.display.progress import training_display
from cifar_dist.display.terminal import format_bench, format_duration, make_console, print_lines, print_notes
from cifar_dist.model.networks import build_network, find_head, use_dense_products
from cifar_dist.model.optimizer import build_optimizer
from cifar_dist.run.checks import recipe_for_speed
from cifar_dist.run.directory import check_output
from cifar_dist.runtime.distributed import Runtime, connect, start
from cifar_dist.training.evaluation import RunningSums, batch_loss
from cifar_dist.training.measure import endless_steps, random_dataset, seconds_of
from cifar_dist.training.setup import build_trainer
from cifar_dist.training.step import WARMUP_STEPS, capture
from cifar_dist.training.trainer import Trainer

NUM_CLASSES = 10
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}
_MAX_ROUNDS = 16
_STEPS_PER_ROUND = 2


def run(options: BenchOptions, world: World, config: AccelerateConfig) -> int:
    """Measure, print and write the result; return the exit code."""
    console = make_console(quiet=world.rank > 0, stderr=options.json == STANDARD_OUTPUT)
    check_output("--json", options.json, options.recipe, options.config)
    recipe = recipe_for_speed(options)
    micro_batches, typed = recipe.gradient_accumulation_steps, options.precision
    with connect(world, config) as ranks:
        runtime = start(ranks, config, requested_precision=typed, doing="measuring", micro_batches=micro_batches)
        what = f"{recipe_label(options.recipe)}, {describe_network(recipe)}, batch {recipe.global_batch_size}"
        processes = f"{world.size} process{'es' if world.size > 1 else ''}"
        print_notes(console, (*runtime.compute.notes, f"{what}, {processes}, {runtime.compute.line}"))
        result = _measure(recipe, runtime, options.seconds, console)
    print_lines(console, format_bench(result), title="bench")
    if world.rank == 0:
        write_json(options.json, result)
    return EXIT_DONE


def _measure(recipe: Recipe, runtime: Runtime, seconds: float, console: Console) -> dict[str, Any]:
    """Measure each loop for `seconds`; return the content of `bench --json`."""
    dataset = random_dataset(recipe.image_size, recipe.global_batch_size)
    plan = make_plan(recipe, world_size=runtime.world.size, sizes=dataset.sizes, device_type=runtime.device.type)
    # The live view is part of the loop: it is drawn into a buffer.
    buffer, facts = Console(file=io.StringIO(), force_terminal=True), runtime.compute.line
    display = training_display(buffer, plan, quiet=False, facts=facts, memory=runtime.peak_memory_mib)
    with display:
        trainer = build_trainer(recipe, plan, dataset, runtime, display)
        loop = endless_steps(trainer)
        for _ in range(WARMUP_STEPS + 1 if runtime.compute.replays else 0):
            loop()
        steps = [build_bare_step(recipe, runtime), loop]
        rounds = alternate(steps, recipe.global_batch_size, seconds, runtime, lambda text: print_notes(console, [text]))
        parts = seconds_by_part(trainer)
    bare_rate, loop_rate = (statistics.median(rates) for rates in zip(*rounds, strict=True))
    ratios = [ours / bare for bare, ours in rounds]
    return {
        "bare_step_images_per_second": bare_rate,
        "loop_images_per_second": loop_rate,
        "loop_over_bare": statistics.median(ratios),
        "loop_over_bare_min": min(ratios),
        "loop_over_bare_max": max(ratios),
        "seconds_by_part": parts,
        "rounds": len(rounds),
        "device": runtime.device.type,
        "precision": runtime.precision,
        "compiler": runtime.compute.backend,
        "num_threads": runtime.num_threads,
        "global_batch_size": recipe.global_batch_size,
        "world_size": runtime.world.size,
        "peak_memory_mib": runtime.peak_memory_mib(),
    }


def bare_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, precision: str
) -> Callable[[], object]:
    """Return a step of forward, backward and optimizer on one fixed batch on the device: the floor for any loop."""
    dtype, device_type = _DTYPES[precision], images.device.type
    model.train()

    def step() -> None:
        with torch.autocast(device_type, dtype=dtype, enabled=dtype is not None):
            logits = model(images)
        functional.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def build_bare_step(recipe: Recipe, runtime: Runtime) -> Callable[[], object]:
    """Build the bare step of this process's share of the batch, computed as the training loop computes."""
    batch, device, layout = recipe.global_batch_size // runtime.world.size, runtime.device, runtime.memory_format
    model = build_network(recipe, NUM_CLASSES)
    use_dense_products(model)
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
    head, precision = find_head(model, NUM_CLASSES), runtime.compute.precision
    optimizer = build_optimizer(model, recipe.optimizer, head, precision=precision)
    if runtime.compute.compiler is not None:
        model = runtime.compile(model, runtime.compute.compiler)
    images = torch.rand(batch, 3, recipe.image_size, recipe.image_size).to(device, memory_format=layout)
    labels = (torch.arange(batch) % NUM_CLASSES).to(device)
    step = bare_step(model, optimizer, images, labels, runtime.precision)
    return captured(step) if runtime.compute.replays else step


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """Return a function that replays `step` as a CUDA graph."""
    for _ in range(WARMUP_STEPS):
        step()
    replay = capture(step)
    return functools.partial(lambda kept: replay(), step)  # the graph itself does not keep the model's memory


def alternate(
    steps: Sequence[Callable[[], object]],
    batch_size: int,
    seconds: float,
    runtime: Runtime,
    announce: Callable[[str], None] = lambda text: None,
    *,
    timer: Callable[[Callable[[], object], int, Runtime], float] = seconds_of,
) -> list[tuple[float, ...]]:
    """Run the steps in turns, each for about `seconds`; return each round's images per second, in the order of `steps`.

    In turns, so that a noisy machine slows all of them alike. `announce` is called with a line on the expected time.
    """
    for step in steps:
        timer(step, 1, runtime)
    # All ranks must do the same number of steps: that of rank 0.
    times = runtime.ranks.all_gather([timer(step, 2, runtime) / 2 for step in steps])[0]
    rounds = max(3, min(_MAX_ROUNDS, int(seconds / (_STEPS_PER_ROUND * max(times)))))
    counts = [max(1, round(seconds / rounds / each)) for each in times]
    expected = rounds * sum(count * each for count, each in zip(counts, times, strict=True))
    announce(f"{rounds} rounds, in turns: about {format_duration(expected)}")
    result, places = [], range(len(steps))
    for number in range(rounds):
        rates = {}
        for place in reversed(places) if number % 2 else places:
            rates[place] = counts[place] * batch_size / timer(steps[place], counts[place], runtime)
        result.append(tuple(rates[place] for place in places))
    return result


def seconds_by_part(trainer: Trainer, *, count: int = 5) -> dict[str, float]:
    """Return the seconds a step of each of its parts, run one by one, with the device synchronized after each."""
    batches, runtime, state, step = trainer.batches, trainer.runtime, trainer.state, trainer.step
    batch = next(iter(batches.epoch(1)))
    table, samples = batches.augmentation.draw_table(1, len(batches.data)), batch.samples.cpu()
    images = batches.data.images[: len(samples)]
    seeds = batches.augmentation.draw_seeds(1, len(batches.data))[samples]
    pixels = batches.augmentation.apply(images, table[samples], seeds)
    sums, made = RunningSums(runtime.device), dict[str, Tensor]()

    def forward() -> None:
        made["logits"] = step.forward(batch)
        made["loss"] = batch_loss(made["logits"], batch, trainer.recipe.label_smoothing)

    parts: dict[str, Callable[[], object]] = {
        "data": lambda: (table[samples], batches.data.images.index_select(0, batch.samples)),
        "augmentation": lambda: batches.augmentation.apply(images, table[samples], seeds),
        "normalization": lambda: batches.normalize(pixels),
        "forward": forward,
        "backward": lambda: runtime.accelerator.backward(made["loss"]),
        "optimizer": step.optimizer.step,
        "metrics": lambda: sums.add(made["loss"].detach(), made["logits"], batch.labels),
        "progress": lambda: trainer.observer.on_step(1, None),
    }
    if (ema := state.ema) is not None:
        parts["average"] = lambda: ema.update(state.model, 1)
    step.model.train()
    seconds = dict.fromkeys(parts, 0.0)
    for _ in range(count):
        for name, action in parts.items():
            seconds[name] += seconds_of(action, 1, runtime) / count
        step.optimizer.zero_grad()
    return seconds
