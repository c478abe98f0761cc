"""`train --seeds`: train several seeds one after the other, and compare them. Imports no torch."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from cifar_dist.config.command_line import parse_arguments
from cifar_dist.config.errors import EXIT_DONE, EXIT_FAILED, UserError
from cifar_dist.config.options import TrainOptions, parse_seeds
from cifar_dist.config.provenance import command_line
from cifar_dist.config.recipe import DEFAULT_RECIPE
from cifar_dist.config.world import World
from cifar_dist.display.report import compare_runs, read_run
from cifar_dist.display.terminal import make_console, print_notes
from cifar_dist.run.directory import RunDirectory
from cifar_dist.run.resolve import RunSpec, resolve
from cifar_dist.runtime.signals import StoppedBeforeTraining


def run(options: TrainOptions, argv: Sequence[str], world: World, train: Callable[[list[str], World], int]) -> int:
    """Train each seed in a run directory of its own by `train(argv, world)`. Return the exit code.

    The same command again skips the finished runs, and resumes an interrupted one. A failed run does not stop the
    others, if this process is no rank of a world.
    """
    console, code, begun = make_console(quiet=world.rank > 0), EXIT_DONE, time.monotonic()
    seeds = parse_seeds(options.seeds or "")
    arguments = {seed: _arguments(argv, seed) for seed in seeds}
    specs = {seed: _resolve(words) for seed, words in arguments.items()}
    runs = {seed: RunDirectory(spec.directory or spec.default_directory) for seed, spec in specs.items()}
    if options.dry_run:
        train(arguments[seeds[0]], world)
        print_notes(console, [f"so for each of {len(seeds)} seeds, up to {runs[seeds[-1]].path}"])
        return EXIT_DONE
    for seed, words in arguments.items():
        # Ranks on other machines may not see the directory: all of them ask rank 0, in `train`.
        finished = runs[seed].finished(specs[seed].recipe.epochs) if world.size == 1 else None
        if finished is not None:
            print_notes(console, [finished])
            continue
        if options.max_minutes is not None:
            left = options.max_minutes - (time.monotonic() - begun) / 60
            words = [*words, "--max-minutes", str(max(left, 0.001))]
        try:
            ended = train(words, world)
        except (KeyboardInterrupt, StoppedBeforeTraining):
            _print_rest(argv, seed, world)
            raise
        code = code or ended
        if ended not in (EXIT_DONE, EXIT_FAILED) or (ended and world.size > 1):
            _print_rest(argv, seed, world)
            return ended
    if world.rank == 0:
        reported = [read_run(run.path, run.path.name) for run in runs.values() if run.summary.exists()]
        compare_runs(reported, None, console)
    return code


def _arguments(argv: Sequence[str], seed: int) -> list[str]:
    """Return the command of one seed's run, which begins or resumes it.

    It names recipe and dataset: those of a stored run would replace their defaults.
    """
    words = list(argv)
    place = next(index for index, word in enumerate(words) if word.partition("=")[0] == "--seeds")
    del words[place : place + (1 if "=" in words[place] else 2)]
    words += ["--seed", str(seed)]
    options = parse_arguments(words)[1]
    assert isinstance(options, TrainOptions)
    spec = resolve(replace(options, run_dir=None))
    words += [] if options.recipe else ["--recipe", DEFAULT_RECIPE]
    words += [] if options.dataset else ["--dataset", spec.dataset]
    directory = options.run_dir / f"seed{seed}" if options.run_dir else spec.default_directory
    return [*words, "--run-dir", str(directory), "--resume"]


def _resolve(words: Sequence[str]) -> RunSpec:
    """Resolve the run of one seed. Raises UserError if its directory holds another run."""
    options = parse_arguments(list(words))[1]
    assert isinstance(options, TrainOptions)
    spec = resolve(options)
    if spec.stored is not None and spec.stored.recipe.epochs != spec.recipe.epochs:
        stored, epochs = spec.stored.recipe.epochs, spec.recipe.epochs
        raise UserError(f"{spec.directory} holds a run of {stored} epochs, and not of {epochs}: name another --run-dir")
    return spec


def _print_rest(argv: Sequence[str], seed: int, world: World) -> None:
    if world.rank == 0:
        print(f"seed {seed} has not ended; resume all with: {command_line(*argv)}", file=sys.stderr)
