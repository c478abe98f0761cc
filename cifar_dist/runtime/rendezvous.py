"""Rendezvous: the ranks connect to rank 0's store. Signals act meanwhile, and a line says who is awaited."""

import errno
import itertools
import os
import socket
import sys
import threading
import time
from datetime import timedelta

from torch import distributed
from torch.distributed import DistNetworkError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from cifar_dist.config.errors import UserError
from cifar_dist.config.world import LISTENING_SOCKET, World
from cifar_dist.runtime.ranks import Ranks

FIRST_NOTE_SECONDS, NOTE_EVERY_SECONDS = 10.0, 60.0
_PEERS_SECONDS = 3 * 3600
"""How long other ranks are waited for: another machine may still be downloading a dataset."""
ANSWER_SECONDS = 60.0
"""How long a host name may take to be known (as in Kubernetes), and rank 0's store to answer."""
_SERVERS: list[Store] = []
"""The stores that this process serves. They last as long as the process, because other ranks may still ask."""
_WORLDS = itertools.count()
"""Numbers the worlds that this process joins in turn, perhaps at one store."""


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
    """Joins the other ranks, and ends with `ranks` or an `error`. A thread, since torch waits deaf to signals."""

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
        """Begin a phase of at most so many seconds."""
        self.state, self.advice, self.deadline = state, advice, time.monotonic() + seconds

    def _find_rank_0(self) -> None:
        """Wait until rank 0's port is open. By Python's sockets: torch's print each attempt."""
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
            store.add("arrived", 1)
        self._begin(f"waiting for others at {self._address}", _PEERS_SECONDS, "are all of them running?")
        while (arrived := store.add("arrived", 0)) < size:
            self.state = f"waiting for {size - arrived} of {size} processes at {self._address}"
            if store.check(["twice"]):
                twice = store.get("twice").decode()
                raise UserError(f"two processes have rank {twice}: set another machine_rank, or RANK, for each machine")
            self._pause(0.1)

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
