"""Finds how fast this device could train at most, and how much of that is reached.

    python benchmarks/limit.py [--recipe standard] [--precision bf16] [--batch 512] [--rounds 10]

Two terms. The arithmetic: the floating-point operations of a step over the rate of a large matrix product. The memory:
the bytes that the step's operations read and write over the rate of a large copy; once for all operations, as they are
run one by one, and once for the convolutions alone, as if everything else were fused into them. A step cannot be
shorter than the larger of the two; without any overlap it takes their sum.

What is reached: the step as torch runs it, with `--compile` also compiled, and on CUDA each of them also with kernels
that cuDNN has tried out and as a CUDA graph, which takes the host's launches away.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cifar_dist.commands.bench import bare_step, captured
from cifar_dist.config.recipe import read_recipe, resolve_recipe
from cifar_dist.model.networks import build_network
from cifar_dist.model.optimizer import build_optimizer

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, and the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.all_bytes, self.matrix_bytes, self.count = 0, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count it unless it is a view."""
        result = function(*args, **(kwargs or {}))
        outputs = [each for each in _flat(result) if isinstance(each, Tensor)]
        if getattr(function, "is_view", False) or not outputs:
            return result
        moved = sum(each.numel() * each.element_size() for each in [*_tensors(args), *outputs])
        self.count += 1
        self.all_bytes += moved
        if any(word in str(function) for word in ("conv", "mm")):
            self.matrix_bytes += moved
        return result


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]


def _tensors(values: Any) -> list[Tensor]:
    return [each for value in values for each in _flat(value) if isinstance(each, Tensor)]


def seconds(action: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Give the median time of an action, the device waited for."""
    times = []
    for _ in range(rounds + 3):
        begun = time.perf_counter()
        action()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[3:])


def rates(device: torch.device, dtype: torch.dtype, rounds: int) -> tuple[float, float]:
    """Measure a large matrix product, in operations a second, and a large copy, in bytes read and written a second."""
    side, size = (8192, 1 << 28) if device.type == "cuda" else (2048, 1 << 25)
    torch.backends.cuda.matmul.allow_tf32 = True  # as torch's convolutions have it
    one, other = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.rand(size, device=device)
    target = torch.empty_like(source)
    matrix_rate = 2 * side**3 / seconds(lambda: one @ other, device, rounds)
    return matrix_rate, 2 * source.nbytes / seconds(lambda: target.copy_(source), device, rounds)


def main() -> None:
    """Print the two terms, the limit, and what is reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="standard")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="no")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="also the compiled step")
    typed = parser.parse_args()
    recipe = resolve_recipe(read_recipe(typed.recipe))
    batch, dtype = typed.batch or recipe.global_batch_size, DTYPES[typed.precision]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matrix_rate, bandwidth = rates(device, dtype, typed.rounds)
    model = build_network(recipe, 10).to(device, memory_format=torch.channels_last)
    images = torch.rand(batch, 3, recipe.image_size, recipe.image_size, device=device)
    images, labels = images.to(memory_format=torch.channels_last), torch.arange(batch, device=device) % 10
    optimizer = build_optimizer(model, recipe.optimizer)

    def bare(network: nn.Module) -> Callable[[], object]:
        """Give the training step of a network."""
        return bare_step(network, optimizer, images, labels, typed.precision)

    step = bare(model)
    step()
    with Traffic() as traffic:
        step()
    with FlopCounterMode(display=False) as counter:  # a multiply-add is two operations
        model(images[:2]).sum().backward()
    optimizer.zero_grad()
    operations = counter.get_total_flops() / 2  # of one image
    arithmetic = operations * batch / matrix_rate
    every, matrices = (count / bandwidth for count in (traffic.all_bytes, traffic.matrix_bytes))
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}: {typed.recipe}, stem {recipe.stem}, batch {batch}, {typed.precision}")
    print(f"matrix product {matrix_rate / 1e12:,.2f} TFLOP/s, copy {bandwidth / 1e9:,.1f} GB/s")
    print(f"arithmetic {1e3 * arithmetic:,.2f} ms a step ({operations / 1e9:.2f} GFLOP an image)")
    print(f"memory {1e3 * every:,.2f} ms for all {traffic.count} operations, {1e3 * matrices:,.2f} ms for the products")
    limit = max(arithmetic, matrices)
    print(
        f"limit {batch / limit:,.0f} images/s; operations one by one, no overlap: {batch / (arithmetic + every):,.0f}"
    )
    steps = {"eager": step} | ({"compiled": bare(torch.compile(model, dynamic=False))} if typed.compile else {})
    for kind, each in steps.items():
        for tried in (False, True) if device.type == "cuda" else (False,):
            torch.backends.cudnn.benchmark = tried
            name = f"{kind}, kernels tried out" if tried else kind
            taken = {name: seconds(each, device, typed.rounds)}
            if device.type == "cuda":
                taken[f"{name}, as a graph"] = seconds(captured(each), device, typed.rounds)
            for name, one in taken.items():
                share = f"{limit / one:.0%} of the limit"
                print(f"{name}: bare step {1e3 * one:,.2f} ms, {batch / one:,.0f} images/s, {share}", flush=True)


if __name__ == "__main__":
    main()
