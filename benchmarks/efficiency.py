"""Compares each convolution, the optimizer, and the whole step with the machine's rate of matrix products.

    python benchmarks/efficiency.py [--recipe fast quick] [--sizes 16 24 32] [--precision bf16] [--layers] [--seconds 3]

The attainable rate is that of a product of two 2048 x 2048 matrices. Prints a Markdown row for each recipe and image
size: operations and seconds of a step, achieved over attainable, and how much of the step is convolutions and how much
the optimizer. `--layers` adds a row for each kind of convolution. FLOPs are counted by torch's FlopCounterMode.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cifar_dist.commands.bench import bare_step
from cifar_dist.config.recipe import Recipe, read_recipe, resolve_recipe
from cifar_dist.model.networks import build_network, find_head, use_dense_products
from cifar_dist.model.optimizer import build_optimizer

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}


def seconds_of(action: Callable[[], object], budget: float) -> float:
    """Return the median time of a call over about `budget` seconds and at least three calls, after two others."""
    action()
    action()
    times, begun = list[float](), time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begun < budget:
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def flops_of(action: Callable[[], object]) -> int:
    """Return the floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def convolutions(model: nn.Module, images: Tensor) -> list[tuple[nn.Conv2d, tuple[int, ...], bool]]:
    """Return each convolution, the shape of its input, and whether its input needs a gradient."""
    seen = list[tuple[nn.Conv2d, tuple[int, ...], bool]]()
    hooks = [
        each.register_forward_hook(lambda m, args, out: seen.append((m, tuple(args[0].shape), args[0].requires_grad)))
        for each in model.modules()
        if isinstance(each, nn.Conv2d)
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return seen


def layer_action(
    conv: nn.Conv2d, shape: tuple[int, ...], needs_gradient: bool, dtype: torch.dtype
) -> Callable[[], object]:
    """Return forward and backward of one convolution."""
    images = torch.rand(shape).to(dtype, memory_format=torch.channels_last).requires_grad_(needs_gradient)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        gradient = torch.rand_like(conv(images))

    def act() -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            output = conv(images)
        if output.requires_grad:
            output.backward(gradient)
        conv.weight.grad = images.grad = None

    return act


def measure(recipe: Recipe, size: int, precision: str, attainable: float, seconds: float, *, layers: bool) -> None:
    """Print the rows of one recipe and size."""
    dtype, batch = DTYPES[precision], recipe.global_batch_size
    model = build_network(recipe, 10)
    use_dense_products(model)
    model = model.to(memory_format=torch.channels_last).train()
    slow = replace(recipe.optimizer, learning_rate=1e-6)
    optimizer = build_optimizer(model, slow, find_head(model, 10), precision=precision)
    images = torch.rand(batch, 3, size, size).to(memory_format=torch.channels_last)
    step = bare_step(model, optimizer, images, torch.arange(batch) % 10, precision)
    flops, whole = flops_of(step), seconds_of(step, seconds)
    step_only = bare_step(model, _Nothing(model), images, torch.arange(batch) % 10, precision)
    updating = whole - seconds_of(step_only, seconds)
    kinds: Counter[tuple[object, ...]] = Counter()
    convs, taken = {}, {}
    for conv, shape, needs in convolutions(model, images):
        key = (shape[1], conv.out_channels, conv.kernel_size[0], conv.stride[0], shape[2], needs)
        kinds[key] += 1
        convs[key] = (conv, shape, needs)
    for key, (conv, shape, needs) in convs.items():
        action = layer_action(conv, shape, needs, dtype)
        taken[key] = (flops_of(action), seconds_of(action, seconds / 3))
    inside = sum(taken[key][1] * count for key, count in kinds.items())
    print(
        f"| `{recipe.model}` {recipe.stem or ''} | {size} | {batch} | {flops / 1e9:,.0f} | {whole:.3f} |"
        f" {flops / whole / 1e9:,.0f} | {flops / whole / attainable:.2f} | {inside / whole:.2f} |"
        f" {updating / whole:.2f} |",
        flush=True,
    )
    for key, count in kinds.items() if layers else ():
        channels_in, channels_out, kernel, stride, side, _ = key
        operations, spent = taken[key]
        print(
            f"|   {count} x {kernel}x{kernel}/{stride} {channels_in}->{channels_out} | {side} | {batch} |"
            f" {count * operations / 1e9:,.0f} | {count * spent:.3f} | {operations / spent / 1e9:,.0f} |"
            f" {operations / spent / attainable:.2f} | | |",
            flush=True,
        )


class _Nothing:
    """An optimizer that does nothing but forget the gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def step(self) -> None:
        """Do nothing."""

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.model.zero_grad()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", default=["fast", "quick", "standard"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 24, 32])
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--layers", action="store_true")
    typed = parser.parse_args()
    square = torch.rand(2048, 2048).to(DTYPES[typed.precision])
    attainable = 2 * 2048**3 / seconds_of(lambda: square @ square, typed.seconds)
    print(
        f"attainable: {attainable / 1e9:,.0f} GFLOP/s, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print("| network | pixels | batch | GFLOP | s | GFLOP/s | of attainable | convolutions | optimizer |")
    print("|---" * 9 + "|")
    for name in typed.recipe:
        for size in typed.sizes:
            recipe = resolve_recipe(read_recipe(name), {})
            measure(recipe, size, typed.precision, attainable, typed.seconds, layers=typed.layers)


if __name__ == "__main__":
    main()
