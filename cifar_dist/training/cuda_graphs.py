"""CUDA graphs: a whole training step is captured once for each batch shape, and then replayed with other batches.

See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

import functools
import gc
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from cifar_dist.data.loader import Batch

WARMUP_STEPS = 3
"""Eager steps before a capture: kernels are selected, and what is allocated once is there."""

_NOTE = (
    "A training step could not be captured as a CUDA graph: something in it makes the host wait for the GPU (.item(),"
    " .cpu(), a print), or the graph's own memory does not fit beside that of the steps before it."
    " With dynamo_config: {dynamo_backend: 'NO'} in --config steps are not captured."
)


def capture(work: Callable[[], object], *, pool: Any = None) -> Callable[[], object]:
    """Capture `work` on the current CUDA device without running it; return a function that replays it.

    Every replay uses the same memory: its results are lost with the next one, unless they are written to tensors that
    existed before. The graph does not keep those alive. Raises RuntimeError if `work` synchronizes with the host.
    """
    graph = torch.cuda.CUDAGraph()
    was_enabled = gc.isenabled()
    gc.disable()  # an earlier graph that is destroyed during the capture would spoil it (pytorch#161037)
    try:
        with torch.cuda.graph(graph, pool=pool):
            work()
    finally:
        if was_enabled:
            gc.enable()
    return graph.replay


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Graph:
    batch: Batch
    """Its tensors are the memory that the graph reads."""
    rates: tuple[Tensor, ...]
    """Likewise, the learning rate of each parameter group."""
    replay: Callable[[], object]


class CudaGraphStep:
    """Runs training steps by replaying CUDA graphs, one for each kind of step and image shape.

    Python values are frozen at capture. The batch and the learning rates are copied into the graph's own tensors;
    anything else that varies must be a tensor already.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        # Each trainer has its own pool: torch frees a pool with its last graph, and refuses it from then on.
        self._capture = functools.partial(capture, pool=torch.cuda.graph_pool_handle())
        self._num_eager: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, _Graph] = {}

    def run(self, work: Callable[[Batch], None], batch: Batch, *, kind: Hashable) -> None:
        """Run `work`, a whole step, on a batch. Steps of one `kind` and image shape must do the same operations."""
        key = (kind, batch.images.shape)
        if key not in self._graphs:
            if self._num_eager[key] < WARMUP_STEPS:
                self._num_eager[key] += 1
                work(batch)
                return
            self._graphs[key] = self._capture_step(work, batch)
        graph = self._graphs[key]
        for own, tensor in zip(_tensors(graph.batch).values(), _tensors(batch).values(), strict=True):
            own.copy_(tensor)
        for rate, group in zip(graph.rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        graph.replay()

    def _capture_step(self, work: Callable[[Batch], None], batch: Batch) -> _Graph:
        copies: dict[str, Any] = {name: tensor.clone() for name, tensor in _tensors(batch).items()}
        own, groups = replace(batch, **copies), self._optimizer.param_groups
        rates = tuple(torch.zeros((), device=batch.images.device) for _ in groups)
        before = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        try:
            replay = self._capture(lambda: work(own))
        except RuntimeError as error:
            error.add_note(_NOTE)
            raise
        finally:
            for group, number in zip(groups, before, strict=True):
                group["lr"] = number
        return _Graph(batch=own, rates=rates, replay=replay)


def _tensors(batch: Batch) -> dict[str, Tensor]:
    values = {each.name: getattr(batch, each.name) for each in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
