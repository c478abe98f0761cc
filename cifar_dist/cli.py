"""The command line: parse, check, provide the data, launch or run, and map exceptions to exit codes. No torch here."""

import errno
import importlib
import importlib.util
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from cifar_dist.config.accelerate_config import load_accelerate_config, processes_to_start, with_processes
from cifar_dist.config.command_line import parse_arguments
from cifar_dist.config.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_KEYBOARD_INTERRUPT,
    EXIT_USER_ERROR,
    PeerFailedError,
    SharedError,
    UserError,
)
from cifar_dist.config.options import TrainOptions, TuneOptions
from cifar_dist.config.provenance import PROGRAM, program_name
from cifar_dist.config.world import LAUNCHED, World
from cifar_dist.run.checks import check_before_torch
from cifar_dist.run.resolve import RunSpec
from cifar_dist.runtime.output import check_output_written, make_output_steady
from cifar_dist.runtime.signals import InterruptBeforeTraining, StoppedBeforeTraining

_MODULES = {"eval": "evaluate", "recipes": "examples", "config": "examples"}
"""The module in `commands` of a command whose name is another."""
_UNUSABLE_PATH = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Return its exit code (config/errors.py)."""
    make_output_steady()
    os.environ.setdefault(PROGRAM, program_name(sys.argv[0]))
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which this environment may lack; figures need none
    world, interrupt = World(), InterruptBeforeTraining()
    try:
        world = World.from_environment(os.environ)
        with interrupt:
            if LAUNCHED in os.environ:  # our launcher blocks signals until a process handles them
                signal.pthread_sigmask(signal.SIG_SETMASK, ())
            code = _run(list(sys.argv[1:] if argv is None else argv), world)
    except (Exception, KeyboardInterrupt, StoppedBeforeTraining) as error:
        reported = _report(error, world, interrupt)
        if reported is None:
            raise
        code = reported
    if world.size > 1:  # at once: a clean end may wait for ranks that are gone, and torch's threads may abort it
        _exit_now(code)
    return code


def _run(argv: list[str], world: World) -> int:
    try:
        command, options = parse_arguments(argv)
    finally:
        check_output_written()  # of --help
    if isinstance(options, TrainOptions) and options.seeds is not None:
        from cifar_dist.commands.seeds import run as train_seeds

        return train_seeds(options, argv, world, _run)
    config = with_processes(load_accelerate_config(options.config), getattr(options, "num_processes", None), world)
    if config.gpu_ids is not None and world.launcher == "none":
        os.environ["CUDA_VISIBLE_DEVICES"] = config.gpu_ids
    count = processes_to_start(world, config)
    is_search = isinstance(options, TuneOptions) and not options.lr_range  # its trials start the processes
    is_dry = getattr(options, "dry_run", False)
    # In a world of several processes rank 0 checks the same later, and tells the others.
    request = (
        check_before_torch(options, world_size=count, machine_rank=config.machine_rank) if world.size == 1 else None
    )
    if request is not None and not is_dry:
        _provide_data(request)
    if os.name == "nt" and (count > 1 or is_search):
        raise UserError("on Windows cifar-dist trains in one process, and has no tune: use WSL")
    if count > 1 and not is_search and (not is_dry or getattr(options, "measure", False)):
        from cifar_dist.runtime.launch import launch

        return launch(argv, config, count)
    _prepare_for_torch()
    module = "lr_range" if getattr(options, "lr_range", False) else _MODULES.get(command, command)
    code: int = importlib.import_module(f"cifar_dist.commands.{module}").run(options, world, config)
    if not (isinstance(options, TrainOptions) or is_search) or is_dry:
        check_output_written()
    return code


def _provide_data(request: RunSpec) -> None:
    """Download what is missing before torch is imported, or processes are started that would wait for it."""
    from cifar_dist.data.cifar import ARCHIVES, provide
    from cifar_dist.display.progress import loading_progress
    from cifar_dist.display.terminal import make_console

    if request.dataset in ARCHIVES:
        with loading_progress(make_console(), request.dataset) as progress:
            provide(ARCHIVES[request.dataset], request.data_dir, progress=progress)


def _prepare_for_torch() -> None:
    """Set the variables that torch reads at its import. Raises UserError if it cannot be imported here."""
    if LAUNCHED in os.environ:
        from cifar_dist.runtime.launch import end_with_parent

        end_with_parent(signal.SIGTERM)
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # matters on a Mac only
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # without name resolution each connection is a warning
    if "OMP_WAIT_POLICY" not in os.environ:
        # GNU OpenMP's threads spin while they wait, and keep the core from others. A short spin costs nothing
        # measurable alone (docs/benchmarks.md).
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"{sys.executable} has no package torch: activate the virtual environment, or pip install -e .")
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        raise UserError("torch needs a folder for temporary files: set TMPDIR to one that can be written") from None
    from cifar_dist.config.cpus import begin_load_sample

    begin_load_sample()


def _report(error: BaseException, world: World, interrupt: InterruptBeforeTraining) -> int | None:
    """Print what a user must know of an exception. Return the exit code; None for an error that Python shows."""
    if isinstance(error, OSError) and error.filename is not None and error.errno in _UNUSABLE_PATH:
        error = UserError(f"cannot use {error.filename}: {error.strerror}")
    if isinstance(error, UserError):
        # A mistake that all ranks know is printed by rank 0; another by the first rank of its machine.
        if world.rank == 0 or (world.local_rank == 0 and not isinstance(error, SharedError)):
            print(f"error: {error}", file=sys.stderr)
        elif LAUNCHED not in os.environ:
            _wait_for_the_end()
        return EXIT_USER_ERROR
    if isinstance(error, BrokenPipeError):  # stdout was closed (for example by `head`): exit quietly
        return EXIT_FAILED
    # For a signal that reached the workers of a measured loop too, torch raises an error of its own.
    if isinstance(error, KeyboardInterrupt) or interrupt.requested is not None:
        if world.rank == 0:
            print("interrupted, with nothing left to save", file=sys.stderr)
        return EXIT_KEYBOARD_INTERRUPT if isinstance(error, KeyboardInterrupt) else EXIT_INTERRUPTED
    if world.size == 1:
        return None
    # A collective failed because of another process; gloo's and NCCL's errors, and the store's, have no class for it.
    lost = ("gloo/transport/", "ncclRemoteError")
    is_lost_peer = isinstance(error, PeerFailedError) or type(error).__name__ == "DistNetworkError"
    if is_lost_peer or any(word in str(error) for word in lost):
        reason = re.sub(r"^\[\S*\] ", "", str(error).partition("\n")[0]).partition(". ")[0]  # without gloo's advice
        advice = "; ".join(["", *getattr(error, "__notes__", [])]) if world.rank < 2 else ""
        print(f"rank {world.rank} ends: another process is gone ({reason}){advice}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return EXIT_FAILED


def _wait_for_the_end() -> None:
    """Wait for SIGTERM: torchrun and Slurm end all ranks with the first, and rank 0 must have printed the mistake."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _exit_now(EXIT_USER_ERROR))
    time.sleep(15)


def _exit_now(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
