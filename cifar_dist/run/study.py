"""A study of `tune`: its folder, the trials in Optuna's journal, and which worker has which trial. Imports no torch."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from cifar_dist.config.errors import UserError
from cifar_dist.config.files import write_atomically
from cifar_dist.config.options import Pruner, Sampler, TuneOptions
from cifar_dist.config.own_code import OWN_CODE_FIELDS, is_own_code, refuse_untyped_code
from cifar_dist.config.recipe import DEFAULT_RECIPE, Recipe, recipe_label, recipe_to_mapping, resolve_recipe
from cifar_dist.config.schema import build, flatten, nested, read_yaml, to_mapping
from cifar_dist.config.space import Choices, Space, default_space, parse_space, read_space
from cifar_dist.run.lock import RunLock, is_locked
from cifar_dist.run.resolve import RunSpec, resolve

DEFAULT_STUDIES = Path("studies")


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyDefinition:
    """What a study searches: the same for all of its workers. Stored in study.yaml."""

    recipe_name: str
    recipe: Recipe
    """The fields that do not vary; its seed is that of the sampler, too."""
    dataset: str
    data_dir: str
    sampler: Sampler
    pruner: Pruner
    space: dict = field(default_factory=dict)  # type: ignore[type-arg]
    """As in a space file."""

    @property
    def own_code(self) -> list[str]:
        """The functions of the user's own that the space chooses from: a command must name their file."""
        choices = (each for name in OWN_CODE_FIELDS for each in self.space.get(name, {}).get("choices", ()))
        return [each for each in choices if is_own_code(each)]

    def parse_space(self) -> Space:
        """Return the checked space."""
        return parse_space(self.space, "the study's space")

    def recipe_of(self, values: Mapping[str, Any]) -> Recipe:
        """Return the recipe of a trial. Raises UserError if these values exclude each other."""
        return resolve_recipe(recipe_to_mapping(self.recipe), nested(values))


def resolve_study(options: TuneOptions) -> tuple[Path, StudyDefinition, RunSpec]:
    """Resolve the study that was asked for: its folder, its definition, and the training that trials vary.

    What is not typed is that of an existing study. Raises UserError if something else was typed.
    """
    name = recipe_label(options.recipe or DEFAULT_RECIPE)
    path = options.study or DEFAULT_STUDIES / f"{name}-{Path(resolve(options.as_training()).dataset).name}"
    stored = read_definition(path)
    if stored is not None:
        _refuse_untyped_code(stored, options, path / "study.yaml")
        name = name if options.recipe else stored.recipe_name
    spec = resolve(_training(options, stored))
    if options.space is not None:
        space: Any = read_space(options.space)
    else:
        space = default_space(spec.recipe) if stored is None else stored.parse_space()
    definition = StudyDefinition(
        recipe_name=name,
        recipe=spec.recipe,
        dataset=spec.dataset,
        data_dir=str(spec.data_dir),
        sampler=options.sampler or ("tpe" if stored is None else stored.sampler),
        pruner=options.pruner or ("median" if stored is None else stored.pruner),
        space={name: to_mapping(each) for name, each in space.items()},
    )
    if stored is not None:
        refuse_other(stored, definition, path)
    return path, definition, replace(spec, recipe_name=name)


def _refuse_untyped_code(stored: StudyDefinition, options: TuneOptions, file: Path) -> None:
    if options.recipe is None:
        refuse_untyped_code(flatten(recipe_to_mapping(stored.recipe)), flatten(options.assignments), str(file))
    if options.space is None and stored.own_code:
        raise UserError(f"{file} needs the code of {stored.own_code[0]}: add --space")


def _training(options: TuneOptions, stored: StudyDefinition | None) -> Any:
    if stored is None:
        return options.as_training()
    data_dir = options.data_dir or Path(stored.data_dir)
    recipe, dataset = options.recipe or stored.recipe, options.dataset or stored.dataset
    return options.as_training(recipe=recipe, dataset=dataset, data_dir=data_dir)


def is_study(path: Path) -> bool:
    """Return whether the folder holds a study."""
    return (path / "study.yaml").exists()


def read_definition(path: Path) -> StudyDefinition | None:
    """Read study.yaml of a folder; None if there is none. Raises UserError."""
    file = path / "study.yaml"
    return build(StudyDefinition, read_yaml(file, "study file"), f"{file}: ", kind="field") if is_study(path) else None


def refuse_other(stored: StudyDefinition, now: StudyDefinition, path: Path) -> None:
    """Raise UserError, naming the fields, if a study would search something else than it does."""
    old, new = (flatten(to_mapping(replace(each, data_dir="", recipe_name=""))) for each in (stored, now))
    if changed := [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]:
        what = ", ".join(f"{name} {old.get(name)} -> {new.get(name)}" for name in changed[:5])
        raise UserError(f"the study {path} searches something else ({what}): name another --study")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Claim:
    """A trial that this worker has, and no other, as long as this process lives."""

    trial: Any
    """Optuna's Trial."""
    values: Mapping[str, Any]
    """By dotted name of the recipe field."""
    lock: FileLock
    is_taken_over: bool
    """Whether a worker that is gone has begun it."""

    @property
    def number(self) -> int:
        """The number of the trial, from 0."""
        return self.trial.number


class Study:
    """The folder of a study. All changes happen under one lock, so that several workers share it.

    `flock` frees the locks of a process that is gone. Optuna's own lock would stay for 30 s.
    """

    def __init__(self, path: Path, definition: StudyDefinition) -> None:
        """Open or create the study. Raises UserError if it searches something else, OSError if the disk refuses."""
        self.path, self.trials, self.definition = path, path / "trials", definition
        self.trials.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path / ".lock")
        self._space = definition.parse_space()
        with self._lock:
            if (stored := read_definition(path)) is not None:
                refuse_other(stored, definition, path)
            else:
                _write_yaml(path / "study.yaml", "# What this study searches.\n", to_mapping(definition))
            self.optuna_study = open_journal(path, self._lock)

    def trial_path(self, number: int, suffix: str = "") -> Path:
        """Return the run directory of a trial; its recipe with the suffix `.yaml`, its output with `.log`."""
        return self.trials / f"{number:04}{suffix}"

    def all_trials(self) -> list[Any]:
        """Return Optuna's records of all trials."""
        return self.optuna_study.get_trials(deepcopy=False)

    def unfinished(self) -> list[int]:
        """Return the numbers of the trials that have begun and not ended."""
        return [each.number for each in self.all_trials() if not each.state.is_finished()]

    def claim(self, most_trials: int | None) -> Claim | None:
        """Return a trial whose worker is gone, else a new one; None if there are `most_trials`.

        The sampler is seeded by the study's seed and the trial's number.
        """
        from optuna.trial import Trial

        with self._lock:
            trials = self.all_trials()
            for each in trials:
                if not each.state.is_finished() and (lock := self._lock_trial(each.number)) is not None:
                    self._seed_sampler(each.number)
                    trial = Trial(self.optuna_study, each._trial_id)
                    return Claim(trial=trial, values=self._suggest(trial), lock=lock, is_taken_over=True)
            if most_trials is not None and len(trials) >= most_trials:
                return None
            self._seed_sampler(len(trials))
            lock = self._lock_trial(len(trials))
            assert lock is not None
            trial = self.optuna_study.ask()
            return Claim(trial=trial, values=self._suggest(trial), lock=lock, is_taken_over=False)

    def finish(self, claim: Claim, state: str, *, value: float | None = None, reason: str | None = None) -> None:
        """Store how a trial ended: `COMPLETE` with its value, `PRUNED`, or `FAIL` with the reason.

        Of the finished trials that nobody resumes, the best one alone keeps its checkpoints. Its recipe becomes
        best.yaml.
        """
        from optuna.trial import TrialState

        with self._lock:
            if reason is not None:
                claim.trial.set_user_attr("reason", reason)
            self.optuna_study.tell(claim.number, value, TrialState[state])
            self._keep_best()
            claim.lock.release()
            Path(claim.lock.lock_file).unlink(missing_ok=True)

    def _keep_best(self) -> None:
        best = best_trial(self.all_trials())
        kept = {*self.unfinished(), *([] if best is None else [best.number])}
        for folder in self.trials.glob("*/checkpoints"):
            if int(folder.parent.name) not in kept and not is_locked(folder.parent):
                shutil.rmtree(folder, ignore_errors=True)
        if best is not None:
            comment = f"# Trial {best.number} of {self.path}: validation accuracy {best.value:.2%}.\n"
            _write_yaml(self.path / "best.yaml", comment, recipe_to_mapping(self.definition.recipe_of(best.params)))

    def write_recipe(self, claim: Claim, recipe: Recipe) -> Path:
        """Write the recipe file of a trial."""
        file = self.trial_path(claim.number, ".yaml")
        _write_yaml(file, f"# Trial {claim.number}.\n", recipe_to_mapping(recipe))
        return file

    def _lock_trial(self, number: int) -> FileLock | None:
        """Lock a trial; None if its worker lives, or a training that a killed worker left still saves."""
        lock = FileLock(self.trial_path(number, ".lock"), timeout=0)
        try:
            lock.acquire()
            if (run := self.trial_path(number)).exists():
                with RunLock() as run_lock:
                    run_lock.acquire(run)
        except (Timeout, UserError):
            lock.release()
            return None
        return lock

    def _seed_sampler(self, number: int) -> None:
        import numpy as np
        from optuna import samplers

        seed = int(np.random.SeedSequence([self.definition.recipe.seed, number]).generate_state(1)[0])
        kinds: dict[str, Any] = {"tpe": samplers.TPESampler, "random": samplers.RandomSampler, "gp": samplers.GPSampler}
        self.optuna_study.sampler = kinds[self.definition.sampler](seed=seed)
        self.optuna_study.pruner = _make_pruner(self.definition)

    def _suggest(self, trial: Any) -> dict[str, Any]:
        """Return the values of all fields; those that the trial has already stay."""
        values = {}
        for name, each in self._space.items():
            if isinstance(each, Choices):
                values[name] = trial.suggest_categorical(name, each.choices)
            elif isinstance(each.low, int):
                values[name] = trial.suggest_int(name, each.low, each.high, step=each.step or 1, log=each.log)
            else:
                values[name] = trial.suggest_float(name, each.low, each.high, step=each.step, log=each.log)
        return values


def _make_pruner(definition: StudyDefinition) -> Any:
    from optuna import pruners

    if definition.pruner == "hyperband":
        return pruners.HyperbandPruner(min_resource=1, max_resource=definition.recipe.epochs)
    return pruners.MedianPruner() if definition.pruner == "median" else pruners.NopPruner()


def open_journal(path: Path, lock: FileLock) -> Any:
    """Open Optuna's study in journal.log, or create it. The caller holds the lock."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file = path / "journal.log"
    if file.exists() and not (content := file.read_bytes()).endswith(b"\n"):  # a writer died with its machine
        with file.open("rb+") as journal:
            journal.truncate(content.rfind(b"\n") + 1)
    storage = JournalStorage(JournalFileBackend(str(file), lock_obj=lock))  # type: ignore[arg-type]
    return optuna.create_study(storage=storage, study_name="tune", direction="maximize", load_if_exists=True)


def best_trial(trials: Sequence[Any]) -> Any:
    """Return the completed trial with the highest value, the earlier of equals; None if none has completed."""
    completed = [each for each in trials if each.state.name == "COMPLETE"]
    return max(completed, key=lambda each: each.value, default=None)


def _write_yaml(path: Path, comment: str, content: Mapping[str, Any]) -> None:
    text = comment + yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    write_atomically(path, lambda file: file.write(text.encode()))
