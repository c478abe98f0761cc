"""Every way in which a training step can be computed on this device, measured: what `auto` chooses is one of them."""

import statistics
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch

from cifar_dist.config.errors import UserError
from cifar_dist.runtime.distributed import Runtime
from cifar_dist.runtime.timing import Contender, alternate, seconds_of

_HOPELESS = 3.0
"""A choice so many times slower than the best so far is measured by a first look alone."""


def sweep(
    build_step: Callable[..., Callable[[], object]],
    batch_size: int,
    runtime: Runtime,
    seconds: float,
    on_round: Callable[[int, int, float], None],
) -> dict[str, Any]:
    """Measure a bare step with every choice of precision, memory layout, compiler and optimiser kernel.

    `build_step` takes these by name and gives the step, of `batch_size` images; `on_round` is `alternate`'s.
    Raises UserError where none can be measured.
    """
    rows: list[dict[str, Any]] = []
    steps: list[tuple[dict[str, Any], Contender]] = []
    best, hopeless = float("inf"), set()
    for choice in _choices(runtime):
        network = (choice["precision"], choice["memory_format"], choice["compiler"])
        if network in hopeless and not choice["is_chosen"]:  # whatever the optimiser's kernel
            continue
        layout = _LAYOUTS[choice["memory_format"]]
        row = {**choice, "images_per_second": None}
        rows.append(row)
        try:
            step = build_step(
                precision=choice["precision"], layout=layout, fused=choice["fused"], compiler=choice["compiler"]
            )
            seconds_of(step, 1, runtime)  # kernels are chosen, or compiled
            taken = min(seconds_of(step, 1, runtime) for _ in range(3))  # one alone may meet other work
        except Exception as error:  # a compiler that is missing or fails, in any of its many ways
            row["failed"] = (str(error).strip() or type(error).__name__).splitlines()[0]
            hopeless.add(network)
            continue
        best, row["images_per_second"] = min(best, taken), batch_size / taken
        if taken < _HOPELESS * best or choice["is_chosen"]:
            steps.append((row, Contender("", step)))
        else:
            hopeless.add(network)
    if not steps:
        raise UserError(f"nothing can be measured here: {rows[0]['failed']}")
    rounds = alternate([each for _, each in steps], batch_size, seconds, runtime, on_round)
    for (row, _), rates in zip(steps, zip(*rounds, strict=True), strict=True):
        row |= {"images_per_second": statistics.median(rates), "min": min(rates), "max": max(rates)}
    rows.sort(key=lambda row: -(row["images_per_second"] or 0))
    chosen = next(row["images_per_second"] or 0 for row in rows if row["is_chosen"])
    over_fastest = chosen / (rows[0]["images_per_second"] or 1)
    return {"sweep": rows, "chosen_over_fastest": over_fastest, "rounds": len(rounds)}


_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _choices(runtime: Runtime) -> Iterator[dict[str, Any]]:
    """Give all that could be chosen on this device, and which of it the training loop has."""
    kind = runtime.device.type
    precisions = {"cpu": ("no", "bf16"), "mps": ("no", "fp16"), "cuda": ("no", "bf16", "fp16")}[kind]
    compilers = {"cpu": (None, "INDUCTOR"), "mps": (None,), "cuda": (None, "INDUCTOR", "CUDAGRAPHS")}[kind]
    # What was asked for is among the choices, whatever it is.
    precisions = tuple(dict.fromkeys((*precisions, runtime.precision)))
    compilers = tuple(dict.fromkeys((*compilers, runtime.compute.backend)))
    for precision, layout, compiler, fused in product(precisions, _LAYOUTS, compilers, (True, False)):
        ours = (runtime.precision, runtime.memory_format, runtime.compute.backend, kind != "mps")
        yield {
            "precision": precision,
            "memory_format": layout,
            "compiler": compiler,
            "fused": fused,
            "is_chosen": (precision, _LAYOUTS[layout], compiler, fused) == ours,
        }
