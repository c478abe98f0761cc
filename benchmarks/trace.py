"""Shows what host and device do in the training loop, by torch's profiler.

    python benchmarks/trace.py [--recipe standard] [--config YAML] [--precision bf16] [--steps 20] [--out trace.json]

Prints how long a step takes, and how long the host needs to give it to the device, without the profiler, which makes
the host slower; then what of that time the device works, what made the host wait for it (nothing should, between two
reports), and the kernels that take longest. `--out` writes the trace for chrome://tracing or https://ui.perfetto.dev.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, count, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cifar_dist.config.accelerate_config import load_accelerate_config
from cifar_dist.config.plan import make_plan
from cifar_dist.config.recipe import read_recipe, resolve_recipe
from cifar_dist.config.world import World
from cifar_dist.run.checks import FOR_SPEED
from cifar_dist.run.results import Observer
from cifar_dist.runtime.distributed import Runtime, connect, start
from cifar_dist.training.measure import random_dataset
from cifar_dist.training.setup import build_trainer

WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")


def training_steps(recipe_name: str, runtime: Runtime) -> Iterator[int]:
    """Do steps as a user's run does them, without a report between them, epoch after epoch."""
    recipe = resolve_recipe(read_recipe(recipe_name), FOR_SPEED)
    dataset = random_dataset(recipe.image_size, recipe.global_batch_size)
    plan = make_plan(recipe, world_size=1, sizes=dataset.sizes, device_type=runtime.device.type)
    trainer = build_trainer(recipe, replace(plan, agree_every_steps=1_000_000), dataset, runtime, Observer())
    return chain.from_iterable(trainer.steps(epoch) for epoch in count(1))


def main() -> None:
    """Profile, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="standard")
    parser.add_argument("--config")
    parser.add_argument("--precision")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    typed = parser.parse_args()
    config = load_accelerate_config(typed.config)
    with connect(World(), config) as ranks:
        runtime = start(ranks, config, requested_precision=typed.precision, doing="measuring")
        steps = training_steps(typed.recipe, runtime)
        list(islice(steps, 10))  # kernels are chosen, and compiled
        runtime.synchronize()
        on_device = [ProfilerActivity.CUDA] if runtime.device.type == "cuda" else []
        begun = time.perf_counter()
        list(islice(steps, typed.steps))
        given = (time.perf_counter() - begun) / typed.steps
        runtime.synchronize()
        taken = (time.perf_counter() - begun) / typed.steps
        with profile(activities=[ProfilerActivity.CPU, *on_device], acc_events=True) as profiler:
            list(islice(steps, typed.steps))
            runtime.synchronize()
        print(f"{typed.recipe} on {runtime.compute.line}, {typed.steps} steps: {1e3 * taken:.2f} ms a step")
        print(f"the host gives a step to the device in {1e3 * given:.2f} ms")
    events = [each for each in profiler.key_averages() if not each.is_user_annotation]  # such as a whole optimiser step
    side = DeviceType.CUDA if on_device else DeviceType.CPU
    times = {each.key: each.self_device_time_total if on_device else each.self_cpu_time_total for each in events
             if each.device_type == side}  # fmt: skip
    busy = sum(times.values()) / typed.steps / 1e6
    name = "device" if on_device else "processor"
    print(f"{name} at work {1e3 * busy:.2f} ms a step, {busy / taken:.0%} of the time without the profiler")
    waits = {each.key: each.count for each in events if each.key in WAITS}
    said = ", ".join(f"{count} x {name}" for name, count in waits.items()) or "never"
    print(f"the host waited: {said}" + (" (one cudaDeviceSynchronize is this program's own)" if on_device else ""))
    for name in sorted(times, key=lambda name: -times[name])[:25]:
        print(f"{times[name] / typed.steps / 1e3:9.3f} ms a step  {name[:100]}")
    if typed.out is not None:
        profiler.export_chrome_trace(str(typed.out))


if __name__ == "__main__":
    main()
