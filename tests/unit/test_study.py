"""Studies of `tune`: which worker has which trial, and what the samplers draw. No training."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cifar_dist.config.errors import UserError
from cifar_dist.config.options import TuneOptions
from cifar_dist.config.recipe import Recipe
from cifar_dist.run.lock import RunLock
from cifar_dist.run.study import Study, StudyDefinition, best_trial, resolve_study

pytest.importorskip("optuna")

SPACE = {
    "optimizer.learning_rate": {"low": 0.01, "high": 1.0, "log": True},
    "global_batch_size": {"choices": [32, 64]},
    "augmentation.crop_padding": {"low": 0, "high": 4},
}


def define(**changes) -> StudyDefinition:
    values = {
        "recipe_name": "quick", "recipe": Recipe.load("quick", epochs=3), "dataset": "shapes", "data_dir": "/data",
        "sampler": "tpe", "pruner": "median", "space": SPACE,
    }  # fmt: skip
    return StudyDefinition(**(values | changes))


def search(path: Path, count: int, definition: StudyDefinition) -> list[dict]:
    """Finish trials of which a small learning rate is good, each in a Study of its own, as after a restart."""
    found = []
    for _ in range(count):
        study = Study(path, definition)
        claim = study.claim(None)
        found.append(dict(claim.values))
        study.finish(claim, "COMPLETE", value=1 - claim.values["optimizer.learning_rate"])
    return found


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp"])
def test_the_same_seed_draws_the_same_trials(tmp_path, sampler):
    definition = define(sampler=sampler)
    first, second = (search(tmp_path / name, 12, definition) for name in ("first", "second"))
    assert first == second
    rates = [values["optimizer.learning_rate"] for values in first]
    assert len(set(rates)) > 10 and {values["global_batch_size"] for values in first} == {32, 64}
    other = search(tmp_path / "other", 2, define(sampler=sampler, recipe=replace(definition.recipe, seed=1)))
    assert other != first[:2]
    best = best_trial(Study(tmp_path / "first", definition).all_trials())
    assert best.number == rates.index(min(rates))
    recipe = Recipe.load(str(tmp_path / "first/best.yaml"))
    assert recipe == definition.recipe_of(first[best.number]) and recipe.optimizer.learning_rate == min(rates)


def test_two_workers_have_different_trials_and_a_dead_ones_trial_goes_on(tmp_path):
    one, two = Study(tmp_path, define()), Study(tmp_path, define())
    first, second = one.claim(2), two.claim(2)
    assert [(claim.number, claim.is_taken_over) for claim in (first, second)] == [(0, False), (1, False)]
    assert one.claim(2) is None and two.claim(2) is None, "both live, and there are two"
    first.lock.release()  # as the system does when the process ends
    again = two.claim(2)
    assert (again.number, again.values, again.is_taken_over) == (0, first.values, True)
    assert one.claim(2) is None
    two.finish(again, "FAIL", reason="out of memory")
    assert one.claim(2) is None, "a finished trial is not taken over"
    assert [each.state.name for each in one.all_trials()] == ["FAIL", "RUNNING"]
    assert one.all_trials()[0].user_attrs == {"reason": "out of memory"}


def test_a_trial_whose_training_outlives_its_worker_is_not_taken_over(tmp_path):
    study = Study(tmp_path, define())
    study.claim(1).lock.release()
    run = study.trial_path(0)
    with RunLock() as training:
        training.acquire(run)
        (run / "config.yaml").touch()
        assert Study(tmp_path, define()).claim(1) is None
    assert Study(tmp_path, define()).claim(1).number == 0


KILLED = """
import os, sys
from pathlib import Path
from optuna.trial import Trial
from cifar_dist.run.study import Study, read_definition
path = Path(sys.argv[1])
Trial.suggest_int = lambda *_, **__: os.kill(os.getpid(), 9)
Study(path, read_definition(path)).claim(None)
"""


def test_a_worker_that_is_killed_while_it_draws_a_trial_loses_nothing(tmp_path):
    """It holds all locks, has half of the values, and, as after a power cut, has written half a line."""
    study = Study(tmp_path, define())
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode == -9
    with (tmp_path / "journal.log").open("ab") as journal:
        journal.write(b'{"op_code": 6, "trial')
    study = Study(tmp_path, define())
    before = dict(study.all_trials()[0].params)
    assert before.keys() < SPACE.keys()
    claim = study.claim(None)
    assert claim.number == 0 and claim.values.keys() == SPACE.keys() and before.items() < claim.values.items()
    study.finish(claim, "COMPLETE", value=0.5)
    for line in (tmp_path / "journal.log").read_text().splitlines():
        json.loads(line)


def test_the_best_trial_alone_keeps_its_checkpoints(tmp_path):
    study = Study(tmp_path, define())
    running = Study(tmp_path, define()).claim(None)
    (tmp_path / "trials/0000/checkpoints").mkdir(parents=True)
    for value in (0.3, 0.5, None, 0.4):
        claim = study.claim(None)
        (study.trial_path(claim.number) / "checkpoints").mkdir(parents=True)
        study.finish(claim, "COMPLETE" if value else "FAIL", value=value)
    kept = sorted(folder.parent.name for folder in tmp_path.glob("trials/*/checkpoints"))
    assert kept == ["0000", "0002"], "the running one's and the best one's"
    assert running.lock.is_locked
    assert (tmp_path / "best.yaml").read_text().startswith(f"# Trial 2 of {tmp_path}: validation accuracy 50.00%.\n")


@pytest.mark.parametrize("pruner", ["hyperband", "median", "none"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_every_pruner_takes_the_epochs_of_a_trial(tmp_path, pruner, epochs):
    study = Study(tmp_path, define(pruner=pruner, recipe=Recipe.load("quick", epochs=epochs)))
    pruned = []
    for trial in range(12):
        claim = study.claim(None)
        claim.trial.report(1 / (trial + 1), 1)
        pruned.append(claim.trial.should_prune())
        study.finish(claim, "PRUNED" if pruned[-1] else "COMPLETE", value=None if pruned[-1] else 1 / (trial + 1))
    assert any(pruned) == (pruner != "none")


def test_a_study_stays_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = TuneOptions(recipe="quick", dataset="shapes", epochs=3, assignments={"label_smoothing": 0.2})
    path, definition, spec = resolve_study(typed)
    assert (path, spec.recipe.epochs, definition.sampler) == (Path("studies/quick-shapes"), 3, "tpe")
    assert definition.space["label_smoothing"]["high"] == 0.2
    assert resolve_study(TuneOptions(recipe="first"))[0] == Path("studies/first-shapes"), "the recipe names its dataset"
    Study(path, definition)
    stored = yaml.safe_load((path / "study.yaml").read_text())
    assert stored["recipe"]["epochs"] == 3
    assert resolve_study(TuneOptions(study=path)) == (path, definition, spec), "the folder alone names it"
    assert resolve_study(replace(typed, data_dir=Path("elsewhere")))[0] == path, "another machine's place"
    with pytest.raises(UserError, match=r"searches something else \(recipe.epochs 3 -> 4\): name another --study"):
        resolve_study(TuneOptions(study=path, epochs=4))
    with pytest.raises(UserError, match=r"searches something else \(sampler tpe -> gp\)"):
        resolve_study(TuneOptions(study=path, sampler="gp"))
    with pytest.raises(UserError, match="searches something else"):  # another worker was the first
        Study(path, replace(definition, pruner="none"))


def test_a_stored_study_runs_no_function_that_was_not_typed(tmp_path):
    Study(tmp_path / "a", define(recipe=Recipe.load("quick", model="net.py:small")))
    with pytest.raises(UserError, match=r"needs the code of its network: add --set model=net.py:small"):
        resolve_study(TuneOptions(study=tmp_path / "a"))
    Study(tmp_path / "b", define(space={"model": {"choices": ["resnet18", "net.py:small"]}}))
    with pytest.raises(UserError, match=r"needs the code of net.py:small: add --space"):
        resolve_study(TuneOptions(study=tmp_path / "b"))
