"""Collectives between the processes of a run, on the CPU, so that no device has to synchronize."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from cifar_dist.config.errors import PeerFailedError, SharedError, UserError
from cifar_dist.config.world import World

T = TypeVar("T")

# Rank 0 may download a dataset while the others wait: the official server takes up to an hour. A process that dies is
# noticed at once, whatever stands here, because its connections close.
_TIMEOUT = timedelta(hours=3)


class Ranks:
    """This process among all processes. In a world of size 1 every method is a plain function call."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.abandoned = False
        """Whether this process leaves early, so that it must not wait for the others."""
        self._group: Any = distributed.new_group(backend="gloo", timeout=_TIMEOUT) if world.size > 1 else None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files, prints and downloads."""
        return self.world.rank == 0

    def all_gather(self, values: Sequence[float]) -> list[tuple[float, ...]]:
        """Return the values of each rank, in order of rank. All ranks must pass equally many. A collective."""
        if self._group is None:
            return [tuple(values)]
        own = torch.tensor(values, dtype=torch.float64)
        everyone = [torch.empty_like(own) for _ in range(self.world.size)]
        distributed.all_gather(everyone, own, group=self._group)
        return [tuple(each.tolist()) for each in everyone]

    def barrier(self) -> None:
        """Wait for all ranks. A collective."""
        self.all_gather([0])  # gloo does not wait if there is nothing to exchange

    def broadcast_from_main(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 and return the result on all ranks. A collective.

        If it raises a UserError, all ranks raise a SharedError. After another exception the other ranks raise
        PeerFailedError.
        """
        made: list[Any] = [None]
        failure: BaseException | None = None
        if self.is_main:
            try:
                made = [make()]
            except Exception as error:  # any failure ends all ranks
                failure = error
        self._fail_together(failure)
        if self._group is not None:
            distributed.broadcast_object_list(made, src=0, group=self._group)
        return made[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block on every rank. If it raises on one, all ranks raise, with the reason of the lowest.

        The block must not contain a collective.
        """
        failure: BaseException | None = None
        try:
            yield
        except Exception as error:  # any failure ends all ranks
            failure = error
        self._fail_together(failure)

    def main_process_first(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0, then on one rank of each other machine, then on the rest. A collective.

        So later ranks find a download of earlier ones, with a shared disk or without.
        """
        result: list[T] = []
        for turn in range(3 if self.world.size > 1 else 1):
            with self.together():
                mine = 0 if self.is_main else 1 if self.world.local_rank == 0 else 2
                if mine == turn:
                    result.append(make())
        return result[0]

    def _fail_together(self, failure: BaseException | None) -> None:
        """Raise on all ranks if one has a failure. The lowest rank with one gives the reason."""
        if self._group is None:
            if failure is not None:
                raise failure
            return
        mistake = isinstance(failure, UserError)
        own = None if failure is None else (str(failure), mistake)
        everyone: list[tuple[str, bool] | None] = [None] * self.world.size
        distributed.all_gather_object(everyone, own, group=self._group)
        first = next((rank for rank, each in enumerate(everyone) if each is not None), None)
        if first is None:
            return
        message, is_mistake = everyone[first] or ("", False)
        if is_mistake:
            raise SharedError(message) from None
        if first == self.world.rank and failure is not None:
            raise failure
        raise PeerFailedError(f"rank {first} failed")
