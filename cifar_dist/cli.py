"""What was typed -> one command, in this process or in several. Without torch, so that every --help is immediate."""

import contextlib
import errno
import importlib
import importlib.util
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from cifar_dist.config.accelerate_config import load_accelerate_config, processes_to_start, with_processes
from cifar_dist.config.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_KEYBOARD_INTERRUPT,
    EXIT_USER_ERROR,
    PeerFailedError,
    SharedError,
    UserError,
)
from cifar_dist.config.options import EvalOptions, Options, PredictOptions, TrainOptions, parse_arguments
from cifar_dist.config.plan import KNOWN_SIZES
from cifar_dist.config.provenance import PROGRAM, program_name
from cifar_dist.config.world import LAUNCHED, World
from cifar_dist.run.checks import check_options
from cifar_dist.run.directory import load_newest, verify
from cifar_dist.run.resolve import RunSpec, check_before_launch, check_plan

_COMMANDS = {"eval": "evaluate"}  # whose module has another name


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; give its exit code, as config/errors.py names them."""
    from cifar_dist.runtime.interrupt import StoppedBeforeTraining, UntilTraining
    from cifar_dist.runtime.output import make_output_steady

    make_output_steady()
    os.environ.setdefault(PROGRAM, program_name(sys.argv[0]))
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which this environment may lack; figures need none
    world, told_to_stop = World(), UntilTraining()
    try:
        world = World.from_environment(os.environ)
        with told_to_stop:
            if LAUNCHED in os.environ:  # our launcher has blocked them until somebody handles them
                signal.pthread_sigmask(signal.SIG_SETMASK, ())
            with _naming_what_may_not_be_read():
                code = _run(list(sys.argv[1:] if argv is None else argv), world)
    except UserError as error:
        # One line: a mistake that all have made, or were told of, is said by rank 0; another by the first of a machine.
        if world.rank == 0 or (world.local_rank == 0 and not isinstance(error, SharedError)):
            print(f"error: {error}", file=sys.stderr)
        elif LAUNCHED not in os.environ:
            _let_the_other_speak()
        code = EXIT_USER_ERROR
    except (KeyboardInterrupt, StoppedBeforeTraining) as end:
        if world.rank == 0:
            print("interrupted, with nothing left to save", file=sys.stderr)
        code = EXIT_INTERRUPTED if isinstance(end, StoppedBeforeTraining) else EXIT_KEYBOARD_INTERRUPT
    except BrokenPipeError:  # stdout was closed (for example by `head`): exit quietly
        code = EXIT_FAILED
    except Exception as error:  # what nobody foresaw: its traceback, from the process that it happened to
        if told_to_stop.requested is None:
            if world.size == 1:
                raise
            _abandon(error, world)
        # It came of the signal, which went to the workers of a measured loop too: torch raises what it makes of that.
        if world.rank == 0:
            print("interrupted, with nothing left to save", file=sys.stderr)
        code = EXIT_INTERRUPTED
    if world.size > 1:  # at once: threads of torch's process group may abort the end of the interpreter
        _exit_now(code)
    return code


@contextlib.contextmanager
def _naming_what_may_not_be_read() -> Iterator[None]:
    """Turn a path that somebody typed and may not look at, or that is too long, into a UserError."""
    try:
        yield
    except OSError as error:
        if error.filename is None or error.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise UserError(f"cannot use {error.filename}: {error.strerror}") from None


def _run(argv: list[str], world: World) -> int:
    """Do what was typed: in this process, or in several that are started for it."""
    from cifar_dist.runtime.output import check_output_written

    try:
        command, options = parse_arguments(argv)
    finally:
        check_output_written()  # of --help
    config = load_accelerate_config(options.config)
    if config.gpu_ids is not None and world.launcher == "none":
        os.environ["CUDA_VISIBLE_DEVICES"] = config.gpu_ids
    config = with_processes(config, getattr(options, "num_processes", None), world)
    count = processes_to_start(world, config)
    request = _check(options, count, config.machine_rank) if world.size == 1 else None
    is_dry = command == "doctor" or getattr(options, "dry_run", False)
    if request is not None and not is_dry:
        _provide_data(request)
    if count > 1 and not is_dry:
        from cifar_dist.runtime import launch

        return launch.launch(argv, config, count)
    if LAUNCHED in os.environ:
        from cifar_dist.runtime.launch import end_with_parent

        end_with_parent(signal.SIGTERM)
    # All are read when torch is imported, so they must stand before that. The first matters on a Mac only. The last
    # is GNU OpenMP's: threads wait for each other in a loop that keeps the core from whoever else needs it; a short
    # one costs nothing measurable alone (docs/benchmarks.md).
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # without name resolution each connection is a warning
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"{sys.executable} has no package torch: activate the virtual environment, or pip install -e .")
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        raise UserError("torch needs a folder for temporary files: set TMPDIR to one that can be written") from None
    code: int = importlib.import_module(f"cifar_dist.commands.{_COMMANDS.get(command, command)}").run(
        options, world, config
    )
    if not isinstance(options, TrainOptions) or options.dry_run:
        check_output_written()
    return code


def _check(options: Options, world_size: int, machine_rank: int) -> RunSpec | None:
    """Check all that can be checked before torch is imported, which takes seconds. Raises UserError.

    Return the request of a training that has something to do. Where the processes of a world are there already, rank 0
    checks, and tells the others.
    """
    if isinstance(options, TrainOptions):
        request = check_before_launch(options, world_size=world_size, machine_rank=machine_rank)
        if request is not None and options.resume and not options.dry_run:
            from cifar_dist.run.directory import RunDirectory

            run = RunDirectory(options.resume_dir or options.run_dir or Path())
            if run.finished(request.recipe.epochs) is not None:
                return None
            load_newest(run, verify)
        if request is not None and request.dataset not in KNOWN_SIZES:
            from cifar_dist.data.folder import check_memory, folder_sizes

            sizes = folder_sizes(Path(request.dataset))
            check_plan(request, world_size=world_size, sizes=sizes)
            check_memory(sizes.num_train + sizes.num_test + sizes.num_validation, request.recipe.image_size)
        return request
    if machine_rank > 0:  # the first machine alone reads and writes
        return None
    check_options(options, world_size=world_size)
    if isinstance(options, EvalOptions) and options.dataset is not None and options.dataset not in KNOWN_SIZES:
        from cifar_dist.data.folder import list_folder

        list_folder(Path(options.dataset), for_training=False)
    if isinstance(options, PredictOptions):
        from cifar_dist.data.folder import find_images

        find_images(options.images)
    return None


def _provide_data(request: RunSpec) -> None:
    """Download what is missing, before torch is imported, or processes are started that would wait for it."""
    from cifar_dist.data.cifar import ARCHIVES, provide
    from cifar_dist.display.progress import loading_progress
    from cifar_dist.display.terminal import make_console

    if request.dataset in ARCHIVES:
        with loading_progress(make_console(), request.dataset) as progress:
            provide(ARCHIVES[request.dataset], request.data_dir, progress=progress)


def _let_the_other_speak() -> None:
    """Wait for the end that the rank brings that says the mistake: torchrun and Slurm end all with the first."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _exit_now(EXIT_USER_ERROR))
    time.sleep(15)


def _abandon(error: Exception, world: World) -> NoReturn:
    """End this process of several, which failed by itself: with its traceback, unless another process is the cause."""
    if _came_of_a_lost_peer(error):
        reason = " ".join(str(error).split("\n")[0].split())
        print(f"rank {world.rank} ends: another process is gone ({reason})", file=sys.stderr)
    else:
        traceback.print_exception(error)
    _exit_now(EXIT_FAILED)


def _came_of_a_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because of another process: gloo's and NCCL's errors have no class for that."""
    lost = ("gloo/transport/", "ncclRemoteError")
    is_store = type(error).__name__ == "DistNetworkError"  # the connection to rank 0's store
    return isinstance(error, PeerFailedError) or is_store or any(word in str(error) for word in lost)


def _exit_now(code: int) -> NoReturn:
    """Leave at once: a clean end waits for the other processes, which might be for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
