"""Loops measured against each other: in turns, in one process, so that a noisy machine is equally unkind to all."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cifar_dist.runtime.distributed import Runtime

_ROUNDS = 16
_STEPS_A_ROUND = 2
_SLOWEST_WORKERS = 1_000
"""Images a second that a loop's workers prepare at least."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A loop, a step at a time."""

    name: str
    step: Callable[[], object]
    prefetched: int = 0
    """Batches that its workers prepare while another loop is measured: done before the clock starts."""


def alternate(
    contenders: Sequence[Contender], batch_size: int, seconds: float, runtime: Runtime
) -> list[tuple[float, ...]]:
    """Run the loops in turns, each for about `seconds`; give each round's images a second, in their order."""
    for contender in contenders:  # caches, allocators and kernels that are chosen at the first call
        seconds_of(contender.step, 3 + contender.prefetched, runtime)
    # All processes must do the same number of steps: rank 0's clock counts.
    times = runtime.ranks.exchange([seconds_of(each.step, 2, runtime) / 2 for each in contenders])[0]
    rounds = max(3, min(_ROUNDS, int(seconds / (_STEPS_A_ROUND * max(times)))))
    counts = [max(1, round(seconds / rounds / step_seconds)) for step_seconds in times]

    def rate(contender: Contender, count: int) -> float:
        """Give one loop's images a second in one round."""
        seconds_of(contender.step, contender.prefetched, runtime)
        taken = seconds_of(contender.step, count, runtime)
        if contender.prefetched:  # its workers shall not take the next one's time
            time.sleep(contender.prefetched * batch_size / _SLOWEST_WORKERS)
        return count * batch_size / taken

    return [
        tuple(rate(contender, count) for contender, count in zip(contenders, counts, strict=True))
        for _ in range(rounds)
    ]


def seconds_of(action: Callable[[], object], count: int, runtime: Runtime) -> float:
    """Give the seconds that `count` calls take, the device's work included."""
    runtime.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        action()
    runtime.synchronize()
    return time.perf_counter() - started
