"""CUDA graphs: what a device was given to do once, which it can do again without the host launching each kernel."""

from collections.abc import Callable

import torch

EAGER_STEPS = 3
"""How often work is done before it is recorded, so that kernels are chosen and what is allocated once is there."""


def recorded(work: Callable[[], object]) -> Callable[[], object]:
    """Do `work` until it can be recorded on the current CUDA device, and give what repeats it."""
    for _ in range(EAGER_STEPS):
        work()
    return CudaGraphs()(work)


class CudaGraphs:
    """Records work on the current CUDA device; what is recorded shares one pool of memory.

    After https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
    """

    def __init__(self) -> None:
        self._last: torch.cuda.CUDAGraph | None = None

    def __call__(self, work: Callable[[], object]) -> Callable[[], object]:
        """Record `work` without doing it; give what does it.

        It is done in the same memory each time, so that what `work` makes is lost with the next recording's, but for
        what it writes to tensors that were there before. It must have been done EAGER_STEPS times without being
        recorded. Raises RuntimeError where `work` makes the host wait.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=None if self._last is None else self._last.pool()):
            work()
        self._last = graph
        return graph.replay
