"""Starts the processes of a world, passes signals on to them, and gives rank 0's exit code. No torch here."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Self

import psutil

from cifar_dist.config.accelerate_config import (
    AccelerateConfig,
    has_outer_launcher,
    wants_cpu,
    wished_compiler,
    wished_precision,
)
from cifar_dist.config.errors import EXIT_CODE_FILE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_KEYBOARD_INTERRUPT

NUM_THREADS = "CIFAR_DIST_NUM_THREADS"
"""The environment variable that hands down the user's own OMP_NUM_THREADS: torchrun sets a 1 that is nobody's wish."""


def launch(argv: Sequence[str], config: AccelerateConfig, num_processes: int) -> int:
    """Run this program's command `argv` in `num_processes` processes (of all machines together); give the exit code.

    It is the code that this machine's first process left; 1 where it left none, 130 after a second Ctrl-C.
    """
    with (
        tempfile.TemporaryDirectory(prefix="cifar-dist-") as folder,
        _Signals(Path(folder), num_processes // config.num_machines) as signals,
    ):
        code_file = Path(folder) / "exit-code"
        environ = child_environment(os.environ, config) | {EXIT_CODE_FILE: str(code_file)}
        signals.agent = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *agent_arguments(config, num_processes), *argv],
            env=environ,
            start_new_session=True,  # a Ctrl-C reaches this process alone, which passes it on once
            preexec_fn=partial(end_with_parent, signal.SIGTERM) if sys.platform == "linux" else None,
        )
        if signals.code is None:  # else a signal came while it was started, and it is killed now
            signals.agent.wait()
        with contextlib.suppress(OSError, ValueError):
            return int(code_file.read_text())
        return EXIT_FAILED if signals.code is None else signals.code


def end_with_parent(number: int) -> None:
    """Have the system send this process a signal when its parent is gone, however that came about. Linux alone can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG


def agent_arguments(config: AccelerateConfig, num_processes: int) -> list[str]:
    """Give torch.distributed.run's arguments for this machine's share of the processes."""
    machines = config.num_machines
    arguments = [f"--nproc-per-node={num_processes // machines}"]
    if machines == 1:
        arguments += ["--standalone"]  # a free port of its own
    else:
        arguments += [
            f"--nnodes={machines}",
            f"--node-rank={config.machine_rank}",
            f"--master-addr={config.main_process_ip}",
            f"--master-port={config.main_process_port or 29500}",
            "--rdzv-conf=timeout=10800",  # the other machine may still be downloading
        ]
    return [*arguments, "-m", "cifar_dist"]


def child_environment(environ: Mapping[str, str], config: AccelerateConfig) -> dict[str, str]:
    """Give the environment of the processes: an outer launcher's words are taken out, and the user's handed down."""
    outer = has_outer_launcher(environ)
    foreign = ("ACCELERATE_", "TORCHELASTIC_", "PET_")
    child = {name: value for name, value in environ.items() if not name.startswith(foreign)}
    wishes = {
        "ACCELERATE_MIXED_PRECISION": wished_precision(None, config, environ),
        "ACCELERATE_DYNAMO_BACKEND": wished_compiler(config, environ),
        "ACCELERATE_DYNAMO_MODE": config.dynamo_mode,
    }
    child |= {name: wish for name, wish in wishes.items() if wish not in (None, "no", "auto")}
    if wants_cpu(config, environ):
        child["ACCELERATE_USE_CPU"] = "true"
    threads = child.pop("OMP_NUM_THREADS", None)
    if threads is not None and not (outer and threads == "1"):
        child[NUM_THREADS] = threads
    # torchrun would set it, with a warning; the processes choose their number of threads themselves.
    child["OMP_NUM_THREADS"] = threads or "1"
    # Found also where the package is not installed, and run from any folder.
    paths = [str(Path(__file__).parents[2]), *filter(None, [environ.get("PYTHONPATH")])]
    return child | {"PYTHONPATH": os.pathsep.join(paths)}


class _Signals:
    """Passes signals on to the processes while they run; a second Ctrl-C, or SIGQUIT, ends them all.

    They go to the processes themselves and not to torch's agent, which would shut down with a traceback, after 30
    seconds by SIGKILL, and knows no SIGUSR. Until all of them hear signals nothing has been done that could be lost,
    and they are ended: what the agent has started so far may be a helper of its own, or die of a signal by itself.
    """

    def __init__(self, folder: Path, num_processes: int) -> None:
        """Take the folder in which each of this machine's processes says that it hears signals."""
        self._folder = folder
        self._num_processes = num_processes
        self.agent: subprocess.Popen[bytes] | None = None
        self.code: int | None = None
        """The exit code, where the processes were ended before they could give one."""
        self._before: dict[int, Any] = {}
        self._interrupts = 0

    def __enter__(self) -> Self:
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.agent is not None and self.agent.poll() is None:
            self._kill_all()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        hear = sum(1 for _ in self._folder.glob("*.heard-by-*")) >= self._num_processes
        if self._interrupts > 1 or number == getattr(signal, "SIGQUIT", None):
            self._end_all(EXIT_KEYBOARD_INTERRUPT)
        elif not hear:
            self._end_all(EXIT_KEYBOARD_INTERRUPT if number == signal.SIGINT else EXIT_INTERRUPTED)
        else:
            for process in self._processes()[1:]:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)

    def _end_all(self, code: int) -> None:
        self.code = code
        self._kill_all()

    def _kill_all(self) -> None:
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _processes(self) -> list[psutil.Process]:
        """Give the agent and what it started, the agent first, so that it starts nothing more when it is killed."""
        try:
            agent = psutil.Process(-1 if self.agent is None else self.agent.pid)
            return [agent, *agent.children(recursive=True)]
        except (psutil.Error, ValueError):
            return []
