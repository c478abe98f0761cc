"""`bench`: the training loop against the bare training step and against what others do, in turns, in one run."""

import functools
import io
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console

from cifar_dist.baselines import peer, script
from cifar_dist.baselines.bare import BareStep
from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.errors import EXIT_DONE, UserError
from cifar_dist.config.files import STANDARD_OUTPUT, write_json
from cifar_dist.config.options import BenchOptions
from cifar_dist.config.plan import make_plan
from cifar_dist.config.recipe import Recipe, recipe_label
from cifar_dist.config.world import World
from cifar_dist.data.dataset import Dataset, LabelledImages
from cifar_dist.display.progress import Display, training_display
from cifar_dist.display.tables import format_bench, format_duration, format_sweep
from cifar_dist.display.terminal import make_console, print_lines, print_notes
from cifar_dist.model.convolution import use_dense_products
from cifar_dist.model.optimizer import build_optimizer
from cifar_dist.model.resnet import build_resnet
from cifar_dist.run.checks import recipe_for_speed
from cifar_dist.run.run_files import check_json
from cifar_dist.runtime.distributed import Runtime, connect, start
from cifar_dist.runtime.graphs import EAGER_STEPS, recorded
from cifar_dist.runtime.timing import Contender, alternate
from cifar_dist.training.setup import build_trainer
from cifar_dist.training.step_profile import flops_per_image, memory_by_part, peak_flops, seconds_by_part
from cifar_dist.training.sweep import sweep
from cifar_dist.training.trainer import Trainer

_NUM_CLASSES = 10


def run(options: BenchOptions, world: World, config: AccelerateConfig) -> int:
    """Measure as asked; give the exit code."""
    console = make_console(quiet=world.rank > 0, stderr=options.json == STANDARD_OUTPUT)
    check_json(options.json, options.recipe, options.config)
    if options.sweep and world.size > 1:
        raise UserError(f"--sweep compares what one process can do, and there are {world.size}: start one")
    recipe = recipe_for_speed(options)
    with connect(world, config) as ranks:
        runtime = start(
            ranks,
            config,
            typed_precision=options.precision,
            doing="measuring",
            micro_batches=recipe.gradient_accumulation_steps,
        )
        what = f"{recipe_label(options.recipe)}, stem {recipe.stem}, batch {recipe.global_batch_size}"
        processes = f"{world.size} process{'es' if world.size > 1 else ''}"
        first = "each is tried first; what has to be compiled takes its time" if options.sweep else "each is warmed up"
        print_notes(console, (*runtime.compute.notes, f"{what}, {processes}, {runtime.compute.line}", first))
        on_round = functools.partial(_say, Display(console))
        if options.sweep:
            build_step = functools.partial(_bare_step, recipe, runtime)
            result = sweep(build_step, recipe.global_batch_size, runtime, options.seconds, on_round)
            result |= _about(recipe, runtime)
        else:
            result = _measure(recipe, runtime, options.seconds, on_round)
    print_lines(console, (format_sweep if options.sweep else format_bench)(result), title="bench")
    if world.rank == 0:
        write_json(options.json, result)
    return EXIT_DONE


def _say(display: Display, done: int, rounds: int, seconds: float) -> None:
    """Say how long it takes, and from time to time how far it is; a bar that moves would be measured too."""
    if done == 0:
        display.on_note(f"{rounds} rounds, in which each has its turn: about {format_duration(seconds)}")
    elif done < rounds:
        display.heartbeat(f"round {done} of {rounds}")


def _measure(
    recipe: Recipe, runtime: Runtime, seconds: float, on_round: Callable[[int, int, float], None]
) -> dict[str, Any]:
    """Measure each loop for `seconds`, in turns, and give what `--json` writes."""
    dataset = random_dataset(recipe.image_size, recipe.global_batch_size)
    plan = make_plan(recipe, world_size=runtime.world.size, sizes=dataset.sizes, device_type=runtime.device.type)
    # Drawn as for a user, on a terminal that nobody sees: the bars cost what they cost.
    display = training_display(
        Console(file=io.StringIO(), force_terminal=True),
        plan,
        quiet=False,
        facts=runtime.compute.line,
        memory=runtime.peak_memory_mib,
    )
    with display:
        loop = Loop(build_trainer(recipe, plan, dataset, runtime, display))
        for _ in range(EAGER_STEPS + 1 if loop.trainer.step.replayed else 0):
            loop()  # until its step is recorded
        bare = _bare_step(
            recipe,
            runtime,
            precision=runtime.precision,
            layout=runtime.memory_format,
            compiler=runtime.compute.backend,
        )
        contenders = [Contender("bare_step", bare), Contender("loop", loop)]
        if runtime.world.size == 1:  # neither of the others has a share for a process
            contenders += _others(recipe, runtime, dataset)
        rounds = alternate(contenders, recipe.global_batch_size, seconds, runtime, on_round)
        parts, memory = seconds_by_part(loop.trainer), memory_by_part(loop.trainer)
    compared, flops = _compared(contenders, rounds), flops_per_image(recipe, _NUM_CLASSES)
    peak = peak_flops(runtime)
    utilisation = None if peak is None else compared["loop_images_per_second"] * flops / (peak * runtime.world.size)
    return {
        **compared,
        "seconds_by_part": parts,
        "memory_mib_by_part": memory,
        "flops_per_image": flops,
        "model_flop_utilisation": utilisation,
        "rounds": len(rounds),
        **_about(recipe, runtime),
    }


def _about(recipe: Recipe, runtime: Runtime) -> dict[str, Any]:
    return {
        "device": runtime.device.type,
        "precision": runtime.precision,
        "compiler": runtime.compute.backend,
        "num_threads": runtime.num_threads,
        "global_batch_size": recipe.global_batch_size,
        "world_size": runtime.world.size,
        "peak_memory_mib": runtime.peak_memory_mib(),
    }


def _others(recipe: Recipe, runtime: Runtime, dataset: Dataset) -> list[Contender]:
    """Give what others do, with the same model, batch and images."""
    train, batch = dataset.train, recipe.global_batch_size
    models = [build_resnet(recipe.stem, _NUM_CLASSES, seed=recipe.seed) for _ in range(2)]
    first = script.ScriptLoop(models[0], train.images, train.labels, batch_size=batch, device=runtime.device)
    second = peer.PeerLoop(models[1], train.images, train.labels, batch_size=batch)
    return [Contender("script", first, script.PREFETCHED), Contender("peer", second, script.PREFETCHED)]


def _compared(contenders: list[Contender], rounds: list[tuple[float, ...]]) -> dict[str, Any]:
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


def _bare_step(
    recipe: Recipe,
    runtime: Runtime,
    *,
    precision: str,
    layout: torch.memory_format,
    fused: bool | None = None,
    compiler: str | None = None,
) -> Callable[[], object]:
    """Build the floor; with several processes each does its share by itself and hears nothing of the others."""
    batch, device, side = recipe.global_batch_size // runtime.world.size, runtime.device, recipe.image_size
    model = build_resnet(recipe.stem, _NUM_CLASSES, seed=recipe.seed)
    use_dense_products(model)
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
    optimizer = build_optimizer(model, recipe.optimizer, fused=fused)
    if compiler not in (None, "CUDAGRAPHS"):
        model = runtime.compile(model, compiler)
    images = torch.rand(batch, 3, side, side).to(device, memory_format=layout)
    labels = (torch.arange(batch) % _NUM_CLASSES).to(device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}[precision]
    step = BareStep(model, optimizer, images, labels, dtype)
    return recorded(step) if compiler == "CUDAGRAPHS" else step


class Loop:
    """Our own loop, a step at a time, epoch after epoch."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.epoch = 0
        self._steps: Iterator[int] = iter(())

    def __call__(self) -> None:
        """Do one step."""
        if next(self._steps, None) is None:
            self.epoch += 1
            trainer = self.trainer
            trainer.observer.on_epoch_start(self.epoch, trainer.recipe.optimizer.learning_rate)
            trainer.state.step = (self.epoch - 1) * trainer.plan.steps_per_epoch
            trainer.state.sums.set(0, 0, 0)
            self._steps = trainer.steps(self.epoch)
            next(self._steps)


def random_dataset(size: int, batch: int) -> Dataset:
    """Make images that nobody will learn from: how long a step takes does not depend on what they show.

    About 20,000, at least four batches of them and no part of one: each step does as much as any other.
    """
    generator, count = torch.Generator().manual_seed(0), batch * max(4, 20_000 // batch)
    images = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(_NUM_CLASSES, (count,), generator=generator)
    part = LabelledImages(images=images, labels=labels)
    return Dataset(name="random", class_names=tuple("0123456789"), train=part, test=part)
