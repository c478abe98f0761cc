"""Loops measured against each other: in turns, in one process, so that a noisy machine is equally unkind to all."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

from cifar_dist.runtime.distributed import Runtime

_ROUNDS = 16
_STEPS_A_ROUND = 2
_SLOW_SECONDS = 2.0
"""Of a step. Workers prepare a batch in less, so that a loop this slow has no advantage of what they prefetched."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A loop, a step at a time."""

    name: str
    step: Callable[[], object]
    prefetched: int = 0
    """Batches that its workers prepare while another loop is measured: done before the clock starts."""


def _unheard(done: int, rounds: int, seconds: float) -> None:
    """Hear nothing."""


def alternate(
    contenders: Sequence[Contender],
    batch_size: int,
    seconds: float,
    runtime: Runtime,
    on_round: Callable[[int, int, float], None] = _unheard,
) -> list[tuple[float, ...]]:
    """Run the loops in turns, each for about `seconds`; give each round's images a second, in their order.

    `on_round` is called before the first round and after each: with the rounds that are done, their number, and the
    seconds that all take, about.
    """
    for contender in contenders:  # caches, allocators and kernels that are chosen at the first call
        seconds_of(contender.step, 1, runtime)
    # All processes must do the same number of steps: rank 0's clock counts.
    times = runtime.ranks.all_gather([seconds_of(each.step, 1, runtime) for each in contenders])[0]
    prefetched = [
        each.prefetched if step_seconds < _SLOW_SECONDS else 0
        for each, step_seconds in zip(contenders, times, strict=True)
    ]
    for contender, ready in zip(contenders, prefetched, strict=True):
        seconds_of(contender.step, 1 + ready, runtime)
    times = runtime.ranks.all_gather([seconds_of(each.step, 2, runtime) / 2 for each in contenders])[0]
    rounds = max(3, min(_ROUNDS, int(seconds / (_STEPS_A_ROUND * max(times)))))
    counts = [max(1, round(seconds / rounds / step_seconds)) for step_seconds in times]

    def rate(place: int) -> float:
        """Give one loop's images a second in one round."""
        seconds_of(contenders[place].step, prefetched[place], runtime)
        taken = seconds_of(contenders[place].step, counts[place], runtime)
        if contenders[place].prefetched:
            _wait_for_workers()
        return counts[place] * batch_size / taken

    steps = [ready + count for ready, count in zip(prefetched, counts, strict=True)]
    all_seconds = rounds * sum(count * each for count, each in zip(steps, times, strict=True))
    on_round(0, rounds, all_seconds)
    result = []
    for number in range(rounds):
        places = range(len(contenders))
        in_turn = reversed(places) if number % 2 else places  # so that none always comes after the same one
        rates = {place: rate(place) for place in in_turn}
        result.append(tuple(rates[place] for place in places))
        on_round(number + 1, rounds, all_seconds)
    return result


def _wait_for_workers() -> None:
    """Wait until this process's children have nothing left to prepare, which would take the next loop's time."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        before = _seconds_worked()
        time.sleep(0.1)
        if _seconds_worked() - before <= 0.01:  # what a clock tick is
            return


def _seconds_worked() -> float:
    total = 0.0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            times = child.cpu_times()
            total += times.user + times.system
    return total


def seconds_of(action: Callable[[], object], count: int, runtime: Runtime) -> float:
    """Give the seconds that `count` calls take, the device's work included."""
    runtime.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        action()
    runtime.synchronize()
    return time.perf_counter() - started
