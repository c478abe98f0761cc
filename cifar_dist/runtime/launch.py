"""Start the processes of a world on this machine, forward signals to them, return rank 0's exit code. No torch here."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Self

from cifar_dist.config.accelerate_config import (
    AccelerateConfig,
    cpu_requested,
    has_outer_launcher,
    precision_requested,
)
from cifar_dist.config.errors import EXIT_FAILED, EXIT_KEYBOARD_INTERRUPT
from cifar_dist.config.world import DEFAULT_PORT, LAUNCHED, LISTENING_SOCKET

_GRACE_SECONDS = 30
"""How long the others may take to end after a process has failed, as with torchrun."""
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)

# This package's folder is on the path for its import alone: neither it nor the current folder (-P) may shadow a module
# of Python's.
_MAIN = (
    "import sys; sys.path.insert(0, {!r}); import cifar_dist; del sys.path[0];{}"
    " from cifar_dist.cli import main; sys.exit(main())"
)
_END_WITH_PARENT = " from cifar_dist.runtime.launch import end_with_parent; end_with_parent(15);"


def launch(argv: Sequence[str], config: AccelerateConfig, num_processes: int) -> int:
    """Run the command `argv` in `num_processes` processes (of all machines together).

    Return the exit code of this machine's first process, or of the one that failed if the first had to be killed;
    1 if a signal killed it, 130 after a second Ctrl-C.
    """
    command = python_command(argv)
    environ = child_environment(os.environ, config, num_processes)
    with contextlib.ExitStack() as stack:
        listening = []
        if config.num_machines == 1:  # on a free port of the loopback address: the host's own name may not resolve
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
            listening = [server.fileno()]
        processes = stack.enter_context(_Processes())
        count = num_processes // config.num_machines
        for local_rank in range(count):
            rank = config.machine_rank * count + local_rank
            own = {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}
            if rank == 0 and listening:
                own[LISTENING_SOCKET] = str(listening[0])
            processes.start(command, environ | own, listening if rank == 0 else [])
        return processes.wait()


def python_command(argv: Sequence[str], *, ends_with_parent: bool = False) -> list[str]:
    """Return the words that run the command `argv` in another Python; on Linux SIGTERM may end it with this process."""
    code = _MAIN.format(str(Path(__file__).parents[2]), _END_WITH_PARENT if ends_with_parent else "")
    return [sys.executable, "-P", "-c", code, *argv]


def end_with_parent(number: int) -> None:
    """Make Linux send this process a signal when its parent is gone, however that ended."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG


def child_environment(environ: Mapping[str, str], config: AccelerateConfig, num_processes: int) -> dict[str, str]:
    """Return the environment of all processes: the user's, without the settings of an outer launcher."""
    foreign = ("ACCELERATE_", "TORCHELASTIC_", "PET_")
    child = {name: value for name, value in environ.items() if not name.startswith(foreign)}
    requested = {
        "ACCELERATE_MIXED_PRECISION": precision_requested(None, config, environ),
        "ACCELERATE_DYNAMO_BACKEND": config.compiler,
        "ACCELERATE_DYNAMO_MODE": config.dynamo_mode,
    }
    child |= {name: value for name, value in requested.items() if value not in (None, "no", "auto")}
    if cpu_requested(config, environ):
        child["ACCELERATE_USE_CPU"] = "true"
    if has_outer_launcher(environ) and child.get("OMP_NUM_THREADS") == "1":
        del child["OMP_NUM_THREADS"]  # set by `accelerate launch`
    child.pop("SLURM_CPUS_PER_TASK", None)  # the CPUs of this process, which its children share
    if config.num_machines > 1:
        port = config.main_process_port or DEFAULT_PORT
        child |= {"MASTER_ADDR": str(config.main_process_ip), "MASTER_PORT": str(port)}
    elif loopback := [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]:
        child.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    size, local_size = str(num_processes), str(num_processes // config.num_machines)
    return child | {LAUNCHED: "1", "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": local_size}


class _Processes:
    """The processes of this machine. Signals are forwarded to them; a second Ctrl-C, or SIGQUIT, kills them all.

    Signals that come before all are started are forwarded by `wait`: raising one here could lose a started process.
    """

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[bytes]] = []
        self._early: list[int] | None = []
        self._num_interrupts = 0
        self._killed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in _FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._forward)
        self._before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._suspend)
        return self

    def __exit__(self, *error: object) -> None:
        self._signal_all(signal.SIGKILL)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def start(self, command: Sequence[str], environ: Mapping[str, str], descriptors: Sequence[int]) -> None:
        """Start a process that inherits open file descriptors, in a session of its own: Ctrl-C reaches us alone.

        It inherits the blocked signals too, and unblocks them when it has its handlers.
        """
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
        try:
            self._started.append(subprocess.Popen(command, env=environ, pass_fds=descriptors, start_new_session=True))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def wait(self) -> int:
        """Wait for all processes. Return the exit code of the whole."""
        early, self._early = self._early, None
        for number in early or ():
            self._forward(number, None)
        failed, deadline = None, 0.0
        while None in [process.poll() for process in self._started]:
            if failed is None and (failed := self._first_failed()):
                deadline = time.monotonic() + _GRACE_SECONDS
            elif failed is not None and time.monotonic() > deadline:
                self._signal_all(signal.SIGKILL)
            time.sleep(0.05)
        failed = failed or self._first_failed()  # all may have ended at once
        if self._killed:
            return EXIT_KEYBOARD_INTERRUPT
        codes = [self._started[0].returncode, (failed or self._started[0]).returncode, EXIT_FAILED]
        return next(code for code in codes if code >= 0)

    def _first_failed(self) -> "subprocess.Popen[bytes] | None":
        # A killed one comes first: the others may have ended because of it.
        ended = [process for process in self._started if process.returncode]
        failed = min(ended, key=lambda process: process.returncode > 0, default=None)
        if failed is not None and failed.returncode < 0 and not self._killed:
            name, local_rank = signal.Signals(-failed.returncode).name, self._started.index(failed)
            hint = "; out of memory?" if name == "SIGKILL" else ""
            print(f"process {local_rank} of this machine was killed by {name}{hint}", file=sys.stderr, flush=True)
        return failed

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self._early is not None:
            self._early.append(number)
            return
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts > 1 or number == signal.SIGQUIT:
            self._killed = True
            self._signal_all(signal.SIGKILL)
        else:
            for process in self._started:
                process.send_signal(number)

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        """Stop and continue with all processes on Ctrl-Z, which their terminal does not send them."""
        self._signal_all(signal.SIGSTOP)
        signal.raise_signal(signal.SIGSTOP)
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: int) -> None:
        """Send a signal to the processes that still run, each with those that it started itself."""
        for process in self._started:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
