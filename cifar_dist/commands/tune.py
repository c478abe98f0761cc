"""`tune`: search for a better recipe. Each trial is a `train` of its own, in a process of its own."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from cifar_dist.config.accelerate_config import AccelerateConfig, processes_to_start
from cifar_dist.config.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_KEYBOARD_INTERRUPT,
    EXIT_USER_ERROR,
    UserError,
)
from cifar_dist.config.files import writing
from cifar_dist.config.options import TuneOptions
from cifar_dist.config.own_code import words_to_type
from cifar_dist.config.provenance import command_line
from cifar_dist.config.recipe import recipe_to_mapping
from cifar_dist.config.schema import flatten
from cifar_dist.config.world import SlurmJob, World
from cifar_dist.display.study import StudyView, print_study, study_view
from cifar_dist.display.terminal import make_console, print_error, print_header
from cifar_dist.run.directory import RunDirectory
from cifar_dist.run.resolve import RunSpec, check_plan
from cifar_dist.run.study import Claim, Study, best_trial, resolve_study
from cifar_dist.runtime.launch import python_command
from cifar_dist.runtime.signals import Interrupt

_DEFAULT_TRIALS = 20
_DISK_ADVICE = "mend that and start the same command again"
_INTERRUPTED = {EXIT_INTERRUPTED, EXIT_KEYBOARD_INTERRUPT, -signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP}
_INTERRUPTED |= {-signal.SIGUSR1, -signal.SIGUSR2}  # Slurm's; they kill a process that has hardly begun
_POLL_SECONDS = 0.1
_WAIT_SECONDS = 1.0


def run(options: TuneOptions, world: World, config: AccelerateConfig) -> int:
    """Work on the trials of a study until it has enough. Return the exit code."""
    if world.size > 1:
        raise UserError("tune starts the processes of its trials: start it once, with --num-processes or --config")
    path, definition, spec = resolve_study(options)
    most_trials = options.trials or (None if options.minutes else _DEFAULT_TRIALS)
    console = make_console()
    with writing(path, _DISK_ADVICE):
        study = Study(path, definition)
    limit = f"{most_trials} trials" if most_trials else f"trials for {options.minutes:g} minutes"
    how = f"{limit} of {spec.recipe.epochs} epochs, sampler {definition.sampler}, pruner {definition.pruner}"
    about = f"{definition.recipe_name} on {spec.dataset}, seed {spec.recipe.seed}"
    print_header(console, {"study": str(path), "recipe": about, "search": how, "fields": ", ".join(definition.space)})
    seconds = None if options.minutes is None else 60 * options.minutes
    with (
        writing(path, _DISK_ADVICE),
        study_view(console, study.all_trials) as view,
        Interrupt(seconds=seconds) as interrupt,
    ):
        worker = Worker(
            study=study,
            spec=spec,
            view=view,
            interrupt=interrupt,
            world_words=_world_words(options),
            world_size=processes_to_start(world, config),
        )
        is_interrupted = not worker.work(most_trials)
    own_model = words_to_type(flatten(recipe_to_mapping(spec.recipe)))
    if interrupt.requested is None and not is_interrupted:
        print_study(console, study.all_trials(), path, spec.dataset, own_model)
        if best_trial(study.all_trials()) is None:
            print_error(f"no trial has completed: see {study.trials}")
            return EXIT_FAILED if not study.unfinished() else EXIT_DONE
        return EXIT_DONE
    trials = ["--trials", options.trials] if options.trials else []
    trials += ["--minutes", options.minutes] if options.minutes else []
    trials += ["--space", options.space] if options.space and definition.own_code else []
    again = command_line("tune", "--study", path, *trials, *_world_words(options), *own_model)
    print_error(f"interrupted; resume with: {again}")
    return EXIT_KEYBOARD_INTERRUPT if interrupt.requested == "SIGINT" else EXIT_INTERRUPTED


def _world_words(options: TuneOptions) -> list[str]:
    """Return the arguments that each training shares with this command."""
    named = {"--config": options.config, "--num-processes": options.num_processes, "--precision": options.precision}
    return [str(word) for flag, value in named.items() if value is not None for word in (flag, value)]


@dataclass(kw_only=True, eq=False)
class Worker:
    """This process's part in a study."""

    study: Study
    spec: RunSpec
    view: StudyView
    interrupt: Interrupt
    world_words: list[str]
    world_size: int
    is_patient: bool = field(default_factory=lambda: SlurmJob.from_environment(os.environ) is None)
    """Whether to wait at the end for trials of other workers, which may die. A Slurm job is requeued itself."""

    def work(self, most_trials: int | None) -> bool:
        """Work until the study has its trials, or the time is over. Return False if a trial was interrupted."""
        while not self.interrupt.wanted:
            claim = self.study.claim(most_trials)
            if claim is not None:
                if not self._work_on(claim):
                    return self.interrupt.wanted
            elif self.is_patient and (others := self.study.unfinished()):
                self.view.on_wait(others)
                time.sleep(_WAIT_SECONDS)
            else:
                break
        return True

    def _work_on(self, claim: Claim) -> bool:
        """Train a trial and store how it ended. Return False if it was interrupted. Raises UserError."""
        study, run = self.study, RunDirectory(self.study.trial_path(claim.number))
        self.view.on_start(claim.number, claim.values, is_taken_over=claim.is_taken_over)
        try:
            recipe = study.definition.recipe_of(claim.values)
            check_plan(replace(self.spec, recipe=recipe), world_size=self.world_size)
        except UserError as error:
            study.finish(claim, "FAIL", reason=str(error))
            self.view.on_end(claim.number)
            return True
        words = ["train", "--recipe", str(study.write_recipe(claim, recipe)), "--dataset", self.spec.dataset]
        words += ["--data-dir", str(self.spec.data_dir), *self.world_words]
        words += ["--run-dir", str(run.path), "--resume", "--quiet", "--skip-test"]
        code, is_pruned = self._train(claim, run, recipe.epochs, words)
        if is_pruned:
            study.finish(claim, "PRUNED")
        elif code == EXIT_DONE:
            value = max(record.val_acc or 0.0 for record in run.read_records())
            study.finish(claim, "COMPLETE", value=value)
        elif code in _INTERRUPTED:
            claim.lock.release()
            return False
        else:
            study.finish(claim, "FAIL", reason=self._reason(claim, code))
        self.view.on_end(claim.number)
        return True

    def _train(self, claim: Claim, run: RunDirectory, epochs: int, words: list[str]) -> tuple[int, bool]:
        """Train in a process, and report each epoch to Optuna. Return the exit code, and whether it was pruned."""
        reported = set(claim.trial.storage.get_trial(claim.trial._trial_id).intermediate_values)
        is_pruned = bool(reported) and max(reported) < epochs and claim.trial.should_prune()
        summary = run.read_summary()
        is_over = summary is not None and summary.is_complete
        if is_pruned or is_over:  # its worker did not come to store it
            return EXIT_DONE, is_pruned or self._report(claim, run, epochs, reported)
        is_told = False
        with _process(words, self.study.trial_path(claim.number, ".log")) as process:
            while True:
                code = process.poll()  # first: all records of an ended process are read
                is_pruned = is_pruned or self._report(claim, run, epochs, reported)
                if code is not None:
                    return code, is_pruned
                if (is_pruned or self.interrupt.wanted) and not is_told:
                    process.terminate()
                    is_told = True
                time.sleep(_POLL_SECONDS)

    def _report(self, claim: Claim, run: RunDirectory, epochs: int, reported: set[int]) -> bool:
        """Report the new epochs in their order. Return whether the pruner ends the trial after one of them."""
        for record in run.read_records():
            if record.epoch not in reported:
                claim.trial.report(record.val_acc, record.epoch)
                reported.add(record.epoch)
                self.view.on_epoch(claim.number, record, epochs)
                if record.epoch < epochs and claim.trial.should_prune():
                    return True
        return False

    def _reason(self, claim: Claim, code: int) -> str:
        """Return why a training failed. Raises UserError for a mistake that other values would not mend."""
        lines = self.study.trial_path(claim.number, ".log").read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        if code < 0:
            name = signal.Signals(-code).name
            return f"killed by {name}{'; out of memory?' if name == 'SIGKILL' else ''}"
        if code == EXIT_USER_ERROR:
            last = last.removeprefix("error: ")
            fields = {part for name in claim.values for part in (name, name.rpartition(".")[2])}
            if not fields & set(re.findall(r"[\w.]+", last)):
                claim.lock.release()
                raise UserError(last)
        return last[:300] or f"exit code {code}"


@contextlib.contextmanager
def _process(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command of this program in a session of its own: Ctrl-C reaches this process alone."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            python_command(words, ends_with_parent=True),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:  # a second Ctrl-C, or an error of ours
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
