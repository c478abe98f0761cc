"""The ranks of a run: how they connect to rank 0's store, and their collectives on the CPU.

A collective on the CPU needs no synchronization of the device. While the ranks connect, signals act.
"""

import errno
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed import DistNetworkError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from cifar_dist.config.errors import PeerFailedError, SharedError, UserError
from cifar_dist.config.world import LISTENING_SOCKET, World

T = TypeVar("T")

FIRST_NOTE_SECONDS, NOTE_EVERY_SECONDS = 10.0, 60.0
_PEERS_SECONDS = 3 * 3600
"""The longest wait for other ranks: another machine may still be downloading a dataset."""
ANSWER_SECONDS = 60.0
"""The longest wait for a host name (as in Kubernetes), and for an answer of rank 0's store."""
_SERVERS: list[Store] = []
"""The stores that this process serves, until it ends: other ranks may still use them."""
_WORLDS = itertools.count()
"""The number of the next world that this process joins, perhaps at the same store."""

# The official server may take an hour for a dataset that rank 0 downloads. A dead process is noticed at once, because
# its connections close.
_TIMEOUT = timedelta(hours=3)


class Ranks:
    """This process among all processes. In a world of size 1 every method is a plain function call."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.abandoned = False
        """Whether this process ends early, and must not wait for the others."""
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
        self.all_gather([0])  # gloo does not wait for an empty message

    def broadcast_from_main(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 and return the result on all ranks. A collective.

        If it raises a UserError, all ranks raise a SharedError. After another exception the other ranks raise
        PeerFailedError.
        """
        made: list[Any] = [None]
        with self.together():
            if self.is_main:
                made = [make()]
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
        if self._group is None:
            if failure is not None:
                raise failure
            return
        own = None if failure is None else (str(failure), isinstance(failure, UserError))
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

    def main_process_first(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0, then on one rank of each other machine, then on the rest. A collective.

        So later ranks find what earlier ones downloaded, on a shared disk or not.
        """
        result: list[T] = []
        for turn in range(3 if self.world.size > 1 else 1):
            with self.together():
                mine = 0 if self.is_main else 1 if self.world.local_rank == 0 else 2
                if mine == turn:
                    result.append(make())
        return result[0]


def rendezvous(world: World, backend: str) -> Ranks:
    """Start torch's process group in a world of several processes. Raises UserError."""
    joining = _Joining(world, backend)
    joining.start()
    note_at = time.monotonic() + FIRST_NOTE_SECONDS
    try:
        while joining.is_alive():
            joining.join(0.1)
            if time.monotonic() > joining.deadline:
                raise UserError(f"gave up {joining.state}: {joining.advice}")
            if time.monotonic() > note_at and world.local_rank == 0 and joining.is_alive():
                print(joining.state, file=sys.stderr, flush=True)
                note_at = time.monotonic() + NOTE_EVERY_SECONDS
    finally:
        joining.cancelled.set()
    if joining.error is not None:
        raise joining.error
    assert joining.ranks is not None
    return joining.ranks


def _prefix() -> str:
    """Return the prefix of the next world's keys: the store of torchrun's agent outlives a restart."""
    return f"cifar-dist-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{next(_WORLDS)}"


class _Joining(threading.Thread):
    """Joins the other ranks, and ends with `ranks` or an `error`. A thread, because torch's waiting blocks signals."""

    def __init__(self, world: World, backend: str) -> None:
        super().__init__(name="rendezvous", daemon=True)
        self.ranks: Ranks | None = None
        self.error: Exception | None = None
        self.cancelled = threading.Event()
        self._world, self._backend = world, backend
        self._host, self._port = world.rendezvous_address(os.environ)
        self._address = f"{self._host}:{self._port}"
        _check_interfaces(os.environ.get("GLOO_SOCKET_IFNAME", ""))
        # torch's agent serves the store of its processes, and chooses their ranks.
        self._has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._begin(f"waiting for rank 0 at {self._address}", _PEERS_SECONDS, "is it running?")

    def run(self) -> None:
        """Join, in this thread."""
        world = self._world
        try:
            if world.rank == 0 and not self._has_agent:
                _SERVERS.append(_serve(self._port))
            self._find_rank_0()
            advice = "another program has the port, set MASTER_PORT to a free one"
            self._begin(f"waiting for an answer of rank 0 at {self._address}", ANSWER_SECONDS, advice)
            answer = timedelta(seconds=ANSWER_SECONDS)
            server = TCPStore(self._host, self._port, is_master=False, wait_for_workers=False, timeout=answer)
            server.set_timeout(timedelta(minutes=30))  # torch's default for a group
            store = PrefixStore(_prefix(), server)
            self._wait_for_all(store)
            advice = f"can the machines reach each other by {self._backend}?"
            self._begin(f"waiting for connections between {world.size} processes", _PEERS_SECONDS, advice)
            distributed.init_process_group(self._backend, store=store, rank=world.rank, world_size=world.size)
            self.ranks = Ranks(world)
        except Exception as error:
            self.error = error

    def _begin(self, state: str, seconds: float, advice: str) -> None:
        self.state, self.advice, self.deadline = state, advice, time.monotonic() + seconds

    def _find_rank_0(self) -> None:
        """Wait until rank 0's port is open. Python's sockets, unlike torch's, do not print each attempt."""
        known_by = time.monotonic() + ANSWER_SECONDS
        while True:
            try:
                socket.create_connection((self._host, self._port), timeout=10).close()
                return
            except (OSError, UnicodeError) as error:
                unusable = isinstance(error, (socket.gaierror, UnicodeError)) or error.errno == errno.ENETUNREACH
                if unusable and time.monotonic() > known_by:
                    raise UserError(f"cannot reach MASTER_ADDR={self._host} (rank 0): {error}") from None
                self.state = f"waiting for rank 0 at {self._address} ({error})"
            self._pause(0.2)

    def _wait_for_all(self, store: Store) -> None:
        rank, size = self._world.rank, self._world.size
        if store.add(f"rank-{rank}", 1) > 1 and not self._has_agent:
            store.set("twice", str(rank))
        else:
            store.add(self._backend, 1)
            store.add("arrived", 1)
        self._begin(f"waiting for others at {self._address}", _PEERS_SECONDS, "are all of them running?")
        while (arrived := store.add("arrived", 0)) < size:
            self.state = f"waiting for {size - arrived} of {size} processes at {self._address}"
            if store.check(["twice"]):
                twice = store.get("twice").decode()
                raise UserError(f"two processes have rank {twice}: set another machine_rank, or RANK, for each machine")
            self._pause(0.1)
        if (count := store.add(self._backend, 0)) < size:
            raise UserError(
                f"only {count} of {size} processes would use {self._backend}, and all must have a GPU or none:"
                " run doctor on each machine, or name a --config with use_cpu: true"
            )

    def _pause(self, seconds: float) -> None:
        if self.cancelled.wait(seconds):
            raise RuntimeError("cancelled")


def _serve(port: int) -> Store:
    """Serve a store on the socket that our launcher has opened, else on the port. Raises UserError if it is taken."""
    inherited = os.environ.pop(LISTENING_SOCKET, None)
    fd = None if inherited is None else int(inherited)
    try:
        return TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, multi_tenant=True, master_listen_fd=fd
        )
    except DistNetworkError as error:
        reason = "is in use" if "EADDRINUSE" in str(error) else "cannot be opened"
        advice = "set MASTER_PORT (main_process_port in a config) to a free one"
        raise UserError(f"port {port} of {socket.gethostname()} {reason}: {advice}") from None


def _check_interfaces(names: str) -> None:
    """Raise UserError if one of the names, separated by commas, is no network interface of this machine."""
    known = [name for _, name in socket.if_nameindex()]
    if unknown := [name for name in names.split(",") if name and name not in known]:
        there = ", ".join(known)
        raise UserError(f"GLOO_SOCKET_IFNAME={names}: there is no interface '{unknown[0]}', set one of {there}")
