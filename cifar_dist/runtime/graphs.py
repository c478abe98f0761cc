"""CUDA graphs: what a device was given to do once, which it can do again without the host launching each kernel."""

import functools
import gc
from collections.abc import Callable
from typing import Any

import torch

EAGER_STEPS = 3
"""How often work is done before it is recorded, so that kernels are chosen and what is allocated once is there."""


def new_recorder() -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Give a `record` whose recordings share their memory, so that they must be replayed one at a time.

    Each training needs its own: torch gives the memory back with the last recording, and then refuses it.
    """
    return functools.partial(record, pool=torch.cuda.graph_pool_handle())


def record(work: Callable[[], object], *, pool: Any = None) -> Callable[[], object]:
    """Record `work` on the current CUDA device without doing it; give what does it.

    It is done in the same memory each time, so that what `work` makes is lost with the next one, but for what it writes
    to tensors that were there before. Those must stay: the recording does not keep them. `work` must have been done
    EAGER_STEPS times without being recorded. After
    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs. Raises RuntimeError where `work` makes the host
    wait.
    """
    graph = torch.cuda.CUDAGraph()
    was_enabled = gc.isenabled()
    gc.disable()  # an earlier graph that is destroyed meanwhile would spoil the recording (pytorch#161037)
    try:
        with torch.cuda.graph(graph, pool=pool):
            work()
    finally:
        if was_enabled:
            gc.enable()
    return graph.replay


def recorded(work: Callable[[], object]) -> Callable[[], object]:
    """Do `work` until it can be recorded on the current CUDA device, and give what repeats it, and keeps `work`."""
    for _ in range(EAGER_STEPS):
        work()
    replay = record(work)

    def repeat(kept: object = work) -> None:
        """Do it once."""
        replay()

    return repeat
