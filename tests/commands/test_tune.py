"""The command `tune`: trials, pruning, failures, interruption. Most trainings here are pretended."""

import contextlib
import importlib.util
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib import image as matplotlib_image
from rich.console import Console

from cifar_dist.cli import main
from cifar_dist.commands import lr_range
from cifar_dist.commands.lr_range import smooth, suggest
from cifar_dist.config.command_line import parse_arguments
from cifar_dist.config.recipe import Recipe
from cifar_dist.display.study import LiveStudy, make_table, study_view
from cifar_dist.run.directory import RunDirectory
from cifar_dist.run.lock import RunLock
from cifar_dist.run.results import EpochRecord, Summary
from cifar_dist.run.study import Study, read_definition
from cifar_dist.run.weights import _tested_checkpoint
from cifar_dist.training.evaluation import EvaluationSet
from tests.commands.test_train import SMALL, error_of, small_world, train
from tests.conftest import ROOT

pytest.importorskip("optuna")
__all__ = ["small_world"]  # a fixture that every test here uses

QUICK = ("--dataset", "shapes", "--recipe", "quick", "--study", "s")
SPACE = "optimizer.learning_rate: {low: 0.01, high: 1.0, log: true}\nlabel_smoothing: {low: 0.0, high: 0.2}\n"


class PretendedTraining:
    """A training that does an epoch each time it is looked at. `script` yields accuracies, or an exit code last."""

    def __init__(self, words: list[str], log: Path, script: Callable[[int, int], Iterator[float | int]]) -> None:
        _, options = parse_arguments(words)
        assert options.resume and options.skip_test and options.quiet
        self.run, self.log = RunDirectory(options.run_dir), log
        self.run.create()
        self.epochs = Recipe.load(options.recipe).epochs
        self.script = script(int(self.run.path.name), len(self.run.read_records()))
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is not None:
            return self.code
        done = len(self.run.read_records())
        after = 0 if done == self.epochs else next(self.script)
        if isinstance(after, int):
            self.end(after)
        else:
            self.run.append_record(
                EpochRecord(
                    epoch=done + 1,
                    step=done + 1,
                    lr=0.1,
                    train_loss=1.0,
                    train_acc=0.5,
                    val_loss=1.0,
                    val_acc=after,
                    images_per_second=1.0,
                    epoch_seconds=1.0,
                    world_size=1,
                )
            )
        return self.code

    def terminate(self) -> None:
        self.end(75)

    def end(self, code: int) -> None:
        self.code = code
        reason = {1: "diverged: the loss is not finite", 2: "error: the disk has no room"}
        self.log.write_text(f"some line\n{reason.get(code, '')}\n")
        status = {0: "completed", 75: "interrupted"}.get(code, "running")
        self.run.write_summary(
            Summary(
                status=status,
                epochs=len(self.run.read_records()),
                best_epoch=1,
                train_seconds=1.0,
                world_size=1,
                device="cpu",
                precision="no",
                num_threads=1,
                peak_memory_mib=None,
                test=None,
            )
        )


@pytest.fixture
def pretend(monkeypatch):
    """Pretend trainings by a script: a function of the trial's number and the epochs that are done."""

    def pretend(script: Callable[[int, int], Iterator[float | int]]) -> None:
        @contextlib.contextmanager
        def process(words, log):
            yield PretendedTraining(words, log, script)

        monkeypatch.setattr("cifar_dist.commands.tune._process", process)

    monkeypatch.setattr("cifar_dist.commands.tune._POLL_SECONDS", 0)
    monkeypatch.setattr("cifar_dist.commands.tune._WAIT_SECONDS", 0)
    Path("space.yaml").write_text(SPACE)
    return pretend


def tune(*argv: str, code: int = 0) -> list:
    """Run the command. Return Optuna's trials."""
    assert main(["tune", *QUICK, "--space", "space.yaml", "--epochs", "3", *argv]) == code
    return trials_of(Path("s"))


def trials_of(path: Path) -> list:
    return Study(path, read_definition(path)).all_trials()


def states(trials: list) -> list[str]:
    return [each.state.name for each in trials]


def better_each_time(number: int, done: int) -> Iterator[float]:
    yield from [0.1 * number + 0.01 * epoch for epoch in (done + 1, done + 3, done + 2)]


def test_trials_are_compared_by_their_best_epoch(pretend, capsys):
    pretend(better_each_time)
    trials = tune("--trials", "3")
    assert states(trials) == ["COMPLETE"] * 3
    assert [each.value for each in trials] == pytest.approx([0.03, 0.13, 0.23])
    assert trials[1].intermediate_values == pytest.approx({1: 0.11, 2: 0.13, 3: 0.12})
    recipes = [Recipe.load(f"s/trials/{number:04}.yaml") for number in range(3)]
    assert [each.optimizer.learning_rate for each in recipes] == [t.params["optimizer.learning_rate"] for t in trials]
    assert Recipe.load("s/best.yaml") == recipes[2]
    out = capsys.readouterr().out
    assert re.search(r"^trial 1 begins: learning_rate 0\.\d+  label_smoothing 0\.\d+$", out, re.MULTILINE)
    assert "trial 1 completed, val acc 13.00%  (best: trial 1, 13.00%)\n" in out
    rows = [line.split()[:4] for line in out.splitlines() if line[:1].isdecimal()][:3]
    assert rows == [[str(n), "completed", f"{10 * n + 3:.2f}%", "3"] for n in (2, 1, 0)]
    assert "python launch.py --resume s/trials/0002" in out
    assert len(tune("--trials", "3")) == 3, "the total of all starts"
    assert len(tune("--trials", "4")) == 4


def test_a_poor_trial_is_pruned(pretend):
    """By the median of the first five; the rest of its epochs is not trained."""
    pretend(lambda number, done: iter([0.5 - 0.01 * number if number < 5 else 0.1] * 3))
    trials = tune("--trials", "6")
    assert states(trials) == ["COMPLETE"] * 5 + ["PRUNED"]
    assert (trials[5].value, trials[5].intermediate_values) == (0.1, {1: 0.1})
    assert len(RunDirectory(Path("s/trials/0005")).read_records()) < 3
    tune("--trials", "6", "--study", "whole", "--pruner", "none")
    assert states(trials_of(Path("whole"))) == ["COMPLETE"] * 6


def test_a_failed_trial_does_not_stop_the_study(pretend, capsys):
    codes = {0: 1, 1: -signal.SIGKILL, 2: 139}
    pretend(lambda number, done: iter([codes[number]] if number in codes else [0.5] * 3))
    trials = tune("--trials", "4")
    assert states(trials) == ["FAIL"] * 3 + ["COMPLETE"]
    reasons = ["diverged: the loss is not finite", "killed by SIGKILL; out of memory?", "some line"]
    assert [each.user_attrs["reason"] for each in trials[:3]] == reasons
    assert "trial 0 failed: diverged: the loss is not finite" in capsys.readouterr().out
    pretend(lambda number, done: iter([1]))
    assert main(["tune", *QUICK[:4], "--study", "t", "--space", "space.yaml", "--trials", "1"]) == 1
    assert capsys.readouterr().err == "no trial has completed: see t/trials\n"


def test_values_that_exclude_each_other_fail_and_train_nothing(pretend):
    pretend(lambda number, done: iter([0.5] * 3))
    Path("space.yaml").write_text(
        "optimizer.momentum: {choices: [0.0, 0.9]}\nglobal_batch_size: {choices: [511, 512]}\n"
    )
    trials = tune("--trials", "12", "--num-processes", "2")
    reasons = {each.user_attrs["reason"].partition("=")[0] for each in trials if each.state.name == "FAIL"}
    assert reasons == {
        "optimizer.nesterov must be false where momentum or sgd_momentum is 0, not True",
        "global_batch_size",
    }
    good = {"optimizer.momentum": 0.9, "global_batch_size": 512}
    assert all((each.state.name == "COMPLETE") == (each.params == good) for each in trials)


def test_a_mistake_stops_the_study_until_it_is_mended(pretend, capsys):
    pretend(lambda number, done: iter([2]))
    tune("--trials", "2", code=2)
    assert error_of(capsys) == "the disk has no room"
    pretend(better_each_time)
    trials = tune("--trials", "2")
    assert states(trials) == ["COMPLETE"] * 2, "the trial goes on"
    Path("space.yaml").write_text("model: {choices: [resnet99]}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretendedTraining, "end", lambda self, code: (
            setattr(self, "code", code), self.log.write_text("error: unknown model 'resnet99'\n")
        ))  # fmt: skip
        pretend(lambda number, done: iter([2]))
        assert main(["tune", *QUICK[:4], "--study", "t", "--space", "space.yaml", "--trials", "2"]) == 1
    assert states(trials_of(Path("t"))) == ["FAIL"] * 2, "the space has no other"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_an_interrupted_study_goes_on_with_its_trial(pretend, capsys, number, code):
    def interrupted(trial, done):
        yield 0.5
        os.kill(os.getpid(), number)
        yield 0.6
        raise AssertionError("it was not told to end")

    pretend(interrupted)
    (trial,) = tune("--trials", "2", code=code)
    assert trial.state.name == "RUNNING"
    values = dict(trial.params)
    line = capsys.readouterr().err
    assert line == "interrupted; resume with: python launch.py tune --study s --trials 2\n"
    pretend(lambda trial, done: iter([0.7] * (3 - done)))
    assert main(["tune", "--study", "s", "--trials", "2"]) == 0
    trials = trials_of(Path("s"))
    assert states(trials) == ["COMPLETE"] * 2
    assert trials[0].params == values and sorted(trials[0].intermediate_values) == [1, 2, 3]
    assert "trial 0 goes on: " in capsys.readouterr().out


def test_the_command_that_resumes_names_the_code_that_the_space_chooses_from(pretend, capsys):
    pretend(lambda trial, done: iter([0.5, 75]))
    Path("own.py").write_text("def same(images):\n    return images\n")
    Path("space.yaml").write_text("augmentation.custom: {choices: [own.py:same]}")
    tune("--trials", "1", code=75)
    line = capsys.readouterr().err
    assert line == "interrupted; resume with: python launch.py tune --study s --trials 1 --space space.yaml\n"


def test_a_trial_that_somebody_resumes_keeps_its_checkpoints(pretend):
    def checkpointed(trial, done):
        Path(f"s/trials/{trial:04}/checkpoints/last.pt").write_bytes(b"")
        return iter([0.5 + trial / 10] * 3)

    pretend(checkpointed)
    tune("--trials", "2")
    assert [path.parent.name for path in Path("s/trials").glob("*/checkpoints")] == ["0001"]
    with RunLock() as lock:
        lock.acquire(Path("s/trials/0001"))
        tune("--trials", "3")
    assert sorted(path.parent.name for path in Path("s/trials").glob("*/checkpoints")) == ["0001", "0002"]


def test_a_training_that_ends_by_itself_ends_the_worker(pretend):
    """At the end of a Slurm job it stops without a signal of ours."""
    pretend(lambda trial, done: iter([0.5, 75]))
    assert states(tune("--trials", "2", code=75)) == ["RUNNING"]


def test_a_trial_that_was_trained_and_not_stored_is_not_trained_again(pretend):
    pretend(lambda trial, done: iter([0.5, 75]))
    tune("--trials", "1", code=75)
    run = RunDirectory(Path("s/trials/0000"))
    last = PretendedTraining(
        ["train", "--recipe", "s/trials/0000.yaml", "--run-dir", str(run.path), "--resume", "--quiet", "--skip-test"],
        Path("log"), lambda trial, done: iter([0.8, 0.6]),
    )  # fmt: skip
    while last.poll() is None:
        pass
    pretend(lambda trial, done: iter([]))
    (trial,) = tune("--trials", "1")
    assert (trial.value, len(trial.intermediate_values)) == (0.8, 3)


def test_after_the_minutes_the_trial_in_progress_is_saved(pretend, capsys):
    pretend(lambda trial, done: iter(lambda: 0.5, None))
    assert main(["tune", *QUICK, "--space", "space.yaml", "--epochs", "100000", "--minutes", "0.002"]) == 0
    (trial,) = trials_of(Path("s"))
    assert trial.state.name == "RUNNING" and RunDirectory(Path("s/trials/0000")).read_summary().status == "interrupted"
    assert "1 trials: 1 running" in capsys.readouterr().out


def test_a_worker_waits_for_the_trial_of_another(pretend, capsys, monkeypatch):
    """Which may die; a Slurm job does not wait, because a dead one is requeued."""
    pretend(better_each_time)
    tune("--trials", "1")
    other = Study(Path("s"), read_definition(Path("s")))
    claim = other.claim(2)
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_JOB_ID", "7")
        assert states(tune("--trials", "2")) == ["COMPLETE", "RUNNING"]
    monkeypatch.setattr(time, "sleep", lambda seconds: claim.lock.release())
    assert states(tune("--trials", "2")) == ["COMPLETE"] * 2
    assert "waiting for the trials of other workers: 1\n" in capsys.readouterr().out


REAL = ("--recipe", "original", *SMALL[2:6], "--set", "validation_size=16", "global_batch_size=32")


def test_real_trials_touch_no_test_image_and_the_best_one_can_be_tested(monkeypatch, capsys):
    """They are trained in this process, on 80 images; the test set has 40."""

    class Training:
        def __init__(self, words, log):
            self.words = words
            log.write_text("diverged")

        def poll(self):
            return main(self.words)

    sizes, predict = [], EvaluationSet.predict
    monkeypatch.setattr(
        EvaluationSet, "predict", lambda each, *rest: sizes.append(len(each.indices)) or predict(each, *rest)
    )
    monkeypatch.setattr(
        "cifar_dist.commands.tune._process", lambda words, log: contextlib.nullcontext(Training(words, log))
    )
    Path("space.yaml").write_text("optimizer.learning_rate: {choices: [0.001, 0.01, 1.0e+30]}\n")
    command = ["tune", *REAL, "--epochs", "2", "--space", "space.yaml", "--study", "s", "--trials", "6"]
    assert main(command) == 0
    assert set(sizes) == {16}, "validation images"
    trials = trials_of(Path("s"))
    failed = [each.params["optimizer.learning_rate"] > 1 for each in trials]
    assert states(trials) == ["FAIL" if each else "COMPLETE" for each in failed] and len(set(failed)) == 2
    best = max((each for each in trials if each.value), key=lambda each: each.value).number
    run = RunDirectory(Path(f"s/trials/{best:04}"))
    assert run.read_summary().test is None and max(r.val_acc for r in run.read_records()) == trials[best].value
    assert main(["--resume", str(run.path)]) == 0
    assert run.read_summary().test.num_samples == 40
    assert main(["--recipe", "s/best.yaml", *SMALL[2:6], "--run-dir", "again"]) == 0
    again = RunDirectory(Path("again"))
    assert again.read_summary().test == run.read_summary().test, "the same training"
    assert read_definition(Path("s")).recipe.validation_size == 16


def test_training_without_the_test(capsys):
    """`eval`, which is advised, reads the weights that the run would test."""
    train("--epochs", "1", "--run-dir", "x", "--skip-test", "--set", "validation_size=16", "selection=best")
    summary = RunDirectory(Path("x")).read_summary()
    assert (summary.status, summary.test, summary.epochs) == ("completed", None, 1)
    assert "test it with: python launch.py eval --ckpt x\n" in capsys.readouterr().out
    assert not list(Path("x").rglob("*.npz"))
    assert _tested_checkpoint(Path("x")) == RunDirectory(Path("x")).best
    shutil.copytree("x", "moved")
    for file in Path("moved/checkpoints").iterdir():
        file.unlink()
    assert main(["--resume", "moved"]) == 2
    assert "the checkpoints of moved are gone" in error_of(capsys)
    assert len(RunDirectory(Path("moved")).read_records()) == 1, "and its records are not"
    assert main(["--resume", "x"]) == 0
    assert RunDirectory(Path("x")).read_summary().test.num_samples == 40


def test_the_report_of_a_study(pretend, capsys):
    pretend(better_each_time)
    tune("--trials", "5")
    capsys.readouterr()
    assert main(["report", "s"]) == 0
    out = capsys.readouterr().out
    assert "5 trials: 5 completed" in out and "written: history.png, importances.png, slices.png in s" in out
    for name in ("history", "importances", "slices"):
        pixels = matplotlib_image.imread(f"s/{name}.png")
        assert pixels.shape[0] > 300 and pixels.std() > 0.05
    assert main(["report", "s", "--out", "elsewhere"]) == 0
    assert len(list(Path("elsewhere").iterdir())) == 3
    assert main(["report", "s", "elsewhere"]) == 2
    assert error_of(capsys) == "s is a study, which is reported alone: name no other folder"
    Path("s/.lock").unlink()
    Path("s/.lock").mkdir()  # refused as in a folder of another user
    assert main(["report", "s", "--out", "elsewhere"]) == 2
    assert "a report locks the study: copy it to a folder of your own" in error_of(capsys)


def test_the_live_view(pretend):
    pretend(better_each_time)
    tune("--trials", "2")
    trials = trials_of(Path("s"))
    console = Console(force_terminal=True, width=100, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    with console.file, study_view(console, lambda: trials) as view:
        assert isinstance(view, LiveStudy)
        view.on_start(1, trials[1].params, is_taken_over=False)
        view.on_end(1)
        view.on_start(2, {"label_smoothing": 0.1}, is_taken_over=False)
        console.print(view)
    shown = console.export_text()
    assert re.search(r"trial +status +val acc +epochs +learning rate", shown)
    assert "13.00%" in shown and "trial 2: label_smoothing 0.1" in shown


@pytest.mark.parametrize("width", [60, 72, 80, 200])
def test_the_table_of_trials_is_whole_in_every_terminal(width):
    """In a narrow one, the fields are below each trial; nothing is cut."""
    rows = [["trial", "status", "val acc", "epochs", "learning rate", "weight decay", "global batch size", "flip"]]
    rows.append(["12", "completed", "56.95%", "4", "0.0512", "0.000512", "512", "alternating"])
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(make_table(console, rows))
    shown = console.export_text()
    assert all(value in shown for value in rows[1]) and "…" not in shown
    assert ("trial 12  completed  val acc" in shown) == (width == 60)
    assert max(map(len, shown.splitlines())) <= width


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--set", "validation_size=0"], "tune compares trials on validation images, and none is held out"),
        (["--space", "none.yaml"], "cannot read space file none.yaml: No such file or directory"),
        (["--trials", "0"], "--trials must be 1 or more, not 0"),
        (["--dataset", "nowhere"], "no dataset or folder 'nowhere'"),
        (["--sampler", "grid"], "argument --sampler: invalid choice"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, capsys, argv, message):
    assert main(["tune", *QUICK, *argv]) == 2
    assert message in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("sampler", "missing"), [("tpe", "optuna"), ("gp", "scipy")])
def test_a_missing_package_is_one_line(monkeypatch, capsys, sampler, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    assert main(["tune", *QUICK, "--sampler", sampler]) == 2
    needed = "optuna" if sampler == "tpe" else "optuna scipy"
    assert error_of(capsys) == f"tune needs the package {missing}: pip install {needed}"


def test_a_learning_rate_range_test(capsys, tmp_path):
    assert main(["tune", "--lr-range", *REAL, "--study", "s"]) == 0
    out = capsys.readouterr().out
    found = re.search(r"falls most steeply at learning rate (\S+) and is lowest at (\S+);", out)
    assert found and 1e-4 < float(found[1]) < float(found[2]) <= 10
    assert f"--set optimizer.learning_rate={found[1]}" in out
    assert [path.name for path in tmp_path.rglob("*")] == ["s", "lr_range.png"]
    assert matplotlib_image.imread("s/lr_range.png").std() > 0.05


def test_a_learning_rate_range_test_needs_a_loss(capsys, monkeypatch):
    monkeypatch.setattr(lr_range, "_step_losses", lambda trainer: iter([math.nan]))
    assert main(["tune", "--lr-range", *REAL, "--study", "s"]) == 2
    assert error_of(capsys) == "the loss of the first step is not finite: look at the network and its images"


def test_the_suggested_rate():
    rates = np.geomspace(1e-7, 10, 100)
    noise = np.random.default_rng(0).normal(0, 0.03, 100)
    falls = 2.3 - 1 / (1 + (1e-3 / rates) ** 2) + np.minimum(rates / 0.1, 10) ** 2  # at 1e-3, and rises from 0.1
    assert 5e-4 < suggest(rates, falls + noise) < 2e-3
    assert suggest(rates, 2.3 + noise) is None
    assert suggest(rates[:3], [2.3, 2.4, 9.0]) is None
    assert smooth([1.0, 2.0, 6.0]).tolist() == [3.0, 3.0, 3.0] and len(smooth([1.0] * 20)) == 20


@pytest.mark.full
def test_a_killed_worker_loses_no_trial(tmp_path):
    """Two workers, one of which is killed while it trains. Twelve trials, none of them twice."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def tiny(num_classes):\n"
        "    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(3 * 64, num_classes))\n"
    )
    command = [sys.executable, ROOT / "launch.py", "tune", "--dataset", "shapes", "--recipe", "quick", "--study", "s"]
    command += ["--set", "model=net.py:tiny", "image_size_schedule=null", "optimizer.name=sgd", "--epochs", "20"]
    command += ["--trials", "12", "--precision", "no", "--pruner", "none"]
    workers = [subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        deadline = time.monotonic() + 120
        while not (lines := list(tmp_path.glob("s/trials/*/metrics.jsonl"))) or len(lines) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        workers[0].kill()
        out, _ = workers[1].communicate(timeout=300)
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert workers[1].returncode == 0 and out.count(" goes on: ") == 1
    logs = [log.read_text() for log in tmp_path.glob("s/trials/*.log")]
    assert sum("interrupted" in log for log in logs) == 1, "its training was told to end"
    trials = trials_of(tmp_path / "s")
    assert states(trials) == ["COMPLETE"] * 12
    for trial in trials:
        epochs = [record.epoch for record in RunDirectory(tmp_path / f"s/trials/{trial.number:04}").read_records()]
        assert epochs == list(range(1, 21))
    assert len({yaml.safe_dump(trial.params) for trial in trials}) == 12
