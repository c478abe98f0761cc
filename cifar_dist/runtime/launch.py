"""Start the processes of a world on this machine, pass signals on to them, return rank 0's exit code. No torch here."""

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
    requested_compiler,
)
from cifar_dist.config.errors import EXIT_FAILED, EXIT_KEYBOARD_INTERRUPT
from cifar_dist.config.world import DEFAULT_PORT, LAUNCHED, LISTENING_SOCKET

_GRACE_SECONDS = 30
"""How long the other processes may take to end by themselves after one has failed; as long as torchrun gives them."""

# The folder of this package is on the path for its import alone: neither it nor the current folder (-P) may shadow a
# module of Python's, as the same file would not in a world of one.
_MAIN = (
    "import sys; sys.path.insert(0, {!r}); import cifar_dist; del sys.path[0];"
    " from cifar_dist.cli import main; sys.exit(main())"
)


def launch(argv: Sequence[str], config: AccelerateConfig, num_processes: int) -> int:
    """Run this program's command `argv` in `num_processes` processes (of all machines together).

    Return the exit code of this machine's first process, or of the one that failed where the first had to be killed;
    1 if a signal killed it, 130 after a second Ctrl-C.
    """
    command = [sys.executable, "-P", "-c", _MAIN.format(str(Path(__file__).parents[2])), *argv]
    with contextlib.ExitStack() as stack:
        environ = child_environment(os.environ, config, num_processes)
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


def end_with_parent(number: int) -> None:
    """Have the system send this process a signal when its parent is gone, however that came about. Linux alone can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG


def child_environment(environ: Mapping[str, str], config: AccelerateConfig, num_processes: int) -> dict[str, str]:
    """Return the environment that all processes share: without an outer launcher's settings, but with the user's."""
    foreign = ("ACCELERATE_", "TORCHELASTIC_", "PET_")
    child = {name: value for name, value in environ.items() if not name.startswith(foreign)}
    wishes = {
        "ACCELERATE_MIXED_PRECISION": precision_requested(None, config, environ),
        "ACCELERATE_DYNAMO_BACKEND": requested_compiler(config, environ),
        "ACCELERATE_DYNAMO_MODE": config.dynamo_mode,
    }
    child |= {name: wish for name, wish in wishes.items() if wish not in (None, "no", "auto")}
    if cpu_requested(config, environ):
        child["ACCELERATE_USE_CPU"] = "true"
    if has_outer_launcher(environ) and child.get("OMP_NUM_THREADS") == "1":
        del child["OMP_NUM_THREADS"]
    child.pop("SLURM_CPUS_PER_TASK", None)  # the CPUs of this process, which its children share
    if config.num_machines > 1:
        port = config.main_process_port or DEFAULT_PORT
        child |= {"MASTER_ADDR": str(config.main_process_ip), "MASTER_PORT": str(port)}
    elif loopback := [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]:
        child.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    size, local_size = str(num_processes), str(num_processes // config.num_machines)
    return child | {LAUNCHED: "1", "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": local_size}


class _Processes:
    """The processes of this machine. A signal is passed on to them; a second Ctrl-C, or SIGQUIT, kills them.

    Signals are blocked until all are started. A process inherits that, and unblocks them when it has its handlers.
    """

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[bytes]] = []
        self._handlers: dict[int, Any] = {}
        self._mask: set[int] = set()
        self._num_interrupts = 0
        self._complete = False
        self._early: list[int] = []
        """Signals that came before all processes were started."""
        self._code: int | None = None
        """The exit code, once the processes were killed on request."""

    def __enter__(self) -> Self:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._pass_on)
        self._handlers[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._suspend)
        return self

    def __exit__(self, *error: object) -> None:
        self._signal_all(signal.SIGKILL)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def start(self, command: Sequence[str], environ: Mapping[str, str], descriptors: Sequence[int]) -> None:
        """Start a process that inherits open file descriptors. Its session is its own: Ctrl-C reaches us alone."""
        self._started.append(subprocess.Popen(command, env=environ, pass_fds=descriptors, start_new_session=True))

    def wait(self) -> int:
        """Wait for all processes; return the exit code of the whole."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        self._complete = True
        for number in self._early:
            self._pass_on(number, None)
        failed: subprocess.Popen[bytes] | None = None
        deadline = 0.0
        while None in [process.poll() for process in self._started]:
            if failed is None:
                failed = self._first_failed()
                deadline = time.monotonic() + _GRACE_SECONDS
            elif time.monotonic() > deadline:
                self._signal_all(signal.SIGKILL)
            time.sleep(0.05)
        if self._code is not None:
            return self._code
        first, other = self._started[0].returncode, failed or self._started[0]
        code = first if first >= 0 else other.returncode
        return code if code >= 0 else EXIT_FAILED

    def _first_failed(self) -> "subprocess.Popen[bytes] | None":
        """Return a process that ended with an error while others run. One line says so if a signal killed it."""
        failed = next((process for process in self._started if process.returncode), None)
        if failed is not None and failed.returncode < 0 and self._code is None:
            name, local_rank = signal.Signals(-failed.returncode).name, self._started.index(failed)
            hint = "; out of memory?" if name == "SIGKILL" else ""
            print(f"process {local_rank} of this machine was killed by {name}{hint}", file=sys.stderr, flush=True)
        return failed

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if not self._complete:  # another thread of this process had the signal unblocked
            self._early.append(number)
            return
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts > 1 or number == signal.SIGQUIT:
            self._code = EXIT_KEYBOARD_INTERRUPT
            self._signal_all(signal.SIGKILL)
        else:
            for process in self._started:
                process.send_signal(number)

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        """Stop with all processes on Ctrl-Z, which their terminal does not send them, and continue with them."""
        self._signal_all(signal.SIGSTOP)
        signal.raise_signal(signal.SIGSTOP)
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: int) -> None:
        """Send a signal to what is left, each with the processes that it has started itself."""
        for process in self._started:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
