"""Start ranks and programs without new interpreters: both are forked from a process that has imported torch.

`run_world(2, first, second)` starts a world once and calls `first(runtime)` and then `second(runtime)` on every rank.
`Program([...])` runs a command line in a process of its own, and `run_ranks` the same command on each rank of a world.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import TCPStore
from torchvision.models._api import BUILTIN_MODELS
from torchvision.models.resnet import BasicBlock, ResNet

from cifar_dist.cli import main
from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.world import World
from cifar_dist.runtime.device import SHARE_GPU
from cifar_dist.runtime.distributed import Runtime, connect, start
from cifar_dist.training import setup

TIMEOUT_SECONDS = 120
"""Within this time some rank must end some check, and a program must end."""
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["cifar_dist.commands.train", "tests.worlds.harness"])

Check = Callable[[Runtime], Any]

ON_CPU = AccelerateConfig(use_cpu=True)


def run_world(
    size: int, *checks: Check, config: AccelerateConfig = ON_CPU, precision: str = "no", share_gpu: bool = False
) -> list[list[Any]]:
    """Run the checks on `size` ranks, one thread each; return a list for each check with what each rank returned."""
    store = _store()
    pipes, processes = [], []
    for rank in range(size):
        here, there = _CONTEXT.Pipe(duplex=False)
        environ = _torchrun(rank, size, store) | ({SHARE_GPU: "1"} if share_gpu else {})
        process = _CONTEXT.Process(target=_rank, args=(environ, checks, config, precision, there), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        returned: list[list[Any]] = [[] for _ in range(size)]
        waiting = dict(zip(pipes, range(size), strict=True))
        while waiting:
            ready = wait(list(waiting), timeout=TIMEOUT_SECONDS)
            assert ready, f"ranks {sorted(waiting.values())} of {size} hang in check {min(map(len, returned))}"
            for pipe in ready:
                rank = waiting[pipe]
                failed, result = pipe.recv()
                assert not failed, f"rank {rank} of {size}:\n{result}"
                returned[rank].append(result)
                if len(returned[rank]) == len(checks):
                    del waiting[pipe]
        for process in processes:
            process.join(5)
    finally:
        for process in processes:
            process.kill()
    return [list(each) for each in zip(*returned, strict=True)]


def _rank(
    environ: dict[str, str], checks: tuple[Check, ...], config: AccelerateConfig, precision: str, pipe: Connection
) -> None:
    os.environ |= environ
    try:
        torch.set_num_threads(1)
        with connect(World.from_environment(os.environ), config) as ranks:
            runtime = start(ranks, config, requested_precision=precision, num_threads=1)
            for check in checks:
                pipe.send((False, check(runtime)))
            ranks.all_gather([0])  # no rank leaves while another communicates
    except BaseException:
        pipe.send((True, traceback.format_exc()))
        os._exit(1)


class Program:
    """The command line, run in a process of its own."""

    def __init__(
        self, argv: list[str], cwd: Path, *, prepare: Callable[[], None] | None = None, **environ: str
    ) -> None:
        """Start it in a folder; `prepare` is called there first."""
        number = len(list(cwd.glob(".out-*")))
        self._files = [cwd / f".{stream}-{number}" for stream in ("out", "err")]
        for file in self._files:
            file.touch()
        arguments = (argv, cwd, {**os.environ, **environ}, self._files, prepare)
        self.process = _CONTEXT.Process(target=_program, args=arguments, daemon=True)
        self.process.start()
        self._deadline = time.monotonic() + TIMEOUT_SECONDS

    def kill(self) -> None:
        """Send SIGKILL."""
        self.process.kill()

    def finish(self) -> tuple[int | None, str, str]:
        """Wait for its end; return exit code (None: killed because it hangs), standard output and standard error."""
        self.process.join(max(0, self._deadline - time.monotonic()))
        code = self.process.exitcode
        self.process.kill()
        out, err = (file.read_text() for file in self._files)
        return code, out, err


def run_ranks(
    size: int,
    argv: list[str],
    cwd: Path,
    *,
    prepare: Callable[[], None] | None = None,
    launcher: Callable[[int], Mapping[str, str]] | None = None,
    **environ: str,
) -> list[tuple[int | None, str, str]]:
    """Run a command on each rank of a world; `launcher` returns a rank's variables (default: those of torchrun)."""
    store = _store()
    variables = launcher or (lambda rank: _torchrun(rank, size, store))
    programs = [Program(argv, cwd, prepare=prepare, **variables(rank), **environ) for rank in range(size)]
    return [program.finish() for program in programs]


def _program(
    argv: list[str], cwd: Path, environ: dict[str, str], files: list[Path], prepare: Callable[[], None] | None
) -> None:
    # It may start processes of its own, as a fresh interpreter would.
    multiprocessing.current_process()._config["daemon"] = False
    multiprocessing.set_start_method(None, force=True)
    os.chdir(cwd)
    os.environ.clear()
    os.environ |= environ
    for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY), stream.fileno())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.argv = ["launch.py", *argv]
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    sys.exit(main(argv))


def _store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


def _torchrun(rank: int, size: int, store: TCPStore) -> dict[str, str]:
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip


class ThinResNet18(ResNet):
    """ResNet-18 with a quarter of the channels behind its stem, for time."""

    def __init__(self, weights: None, num_classes: int) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
        self.fc = nn.Linear(128, num_classes)

    def _make_layer(self, block, planes, *arguments, **named):
        return super()._make_layer(block, planes // 4, *arguments, **named)


@contextmanager
def thin_models() -> Iterator[None]:
    """Build models with a quarter of the channels."""
    original, BUILTIN_MODELS["resnet18"] = BUILTIN_MODELS["resnet18"], ThinResNet18
    try:
        yield
    finally:
        BUILTIN_MODELS["resnet18"] = original


@contextmanager
def models_in_float64() -> Iterator[None]:
    """Build trainers whose weights and images are float64, so that rounding hides nothing."""

    def build(*arguments, **named):
        model = original(*arguments, **named).double()
        model.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
        return model

    original, setup.build_network = setup.build_network, build
    try:
        yield
    finally:
        setup.build_network = original
