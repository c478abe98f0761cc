"""Text and progress on the console. Figures are tested in test_drawings.py and test_report.py."""

import dataclasses
import io
from datetime import datetime

import pytest
from rich.console import Console

from cifar_dist.config.plan import KNOWN_SIZES, make_plan
from cifar_dist.display.live import LiveTraining, training_display
from cifar_dist.display.progress import (
    Display,
    PlainTraining,
    evaluation_display,
    format_end,
    format_quicker,
    loading_progress,
)
from cifar_dist.display.tables import (
    format_class_bars,
    format_confusions,
    format_duration,
    format_epoch,
    format_evaluation_totals,
    format_outcome,
    print_header,
    print_lines,
    print_result,
)
from cifar_dist.run.results import Evaluation, Summary
from tests.conftest import make_recipe
from tests.unit.test_metrics import record

PLAN = make_plan(make_recipe("epochs=20"), world_size=1, sizes=KNOWN_SIZES["cifar10"], device_type="cpu")
TEST = Evaluation(
    num_samples=20,
    loss=0.5,
    top1=0.75,
    top5=0.95,
    per_class_accuracy={"cat": 0.604, "dog": None, "[red]ship": 1.0},
    confusion_matrix=[[12, 3, 5], [0, 0, 0], [0, 0, 9]],
)
SUMMARY = Summary(
    status="early_stopped", epochs=8, best_epoch=5, train_seconds=4794.6, world_size=1, device="cpu", precision="no",
    num_threads=2, peak_memory_mib=800, test=TEST,
)  # fmt: skip


def console(terminal: bool, width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)


def text_of(shown: Console) -> str:
    return shown.file.getvalue()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.234, "1.2 s"), (9.96, "10 s"), (59.4, "59 s"), (59.7, "1 min 0 s"), (3599, "59 min 59 s"),
        (3599.8, "1 h 0 min"), (7260, "2 h 1 min"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_an_epoch_is_one_line():
    line = format_epoch(record(3, train_loss=1.3724, train_acc=0.503), 20, is_best=False)
    assert line == "epoch  3/20  loss 1.372  acc 50.30%  lr 0.1  100 images/s  2.0 s"
    line = format_epoch(record(val_loss=0.5, val_acc=0.8), 5, is_best=True)
    assert "val loss 0.500  val acc 80.00%" in line and line.endswith("2.0 s  best")


def test_the_result_in_words():
    assert format_evaluation_totals(TEST) == "accuracy 75.00%, loss 0.5000 on 20 images"
    eleven = dataclasses.replace(TEST, per_class_accuracy=dict.fromkeys("abcdefghijk", 0.5))
    assert format_evaluation_totals(eleven) == "accuracy 75.00%, top-5 95.00%, loss 0.5000 on 20 images"
    cat, dog, ship = format_class_bars(TEST, width=35)
    assert cat.split() == ["cat", "60.40%", "███████"]
    assert dog.split() == ["dog", "-"]
    assert ship.endswith("100.00%  ███████████")
    outcome = "Early stopping triggered: training ended after 8 of 20 epochs in 1 h 20 min, best epoch 5"
    assert format_outcome(SUMMARY, total_epochs=20) == outcome
    one = dataclasses.replace(SUMMARY, status="completed", epochs=1, best_epoch=None)
    assert format_outcome(one, total_epochs=1) == "Training completed after 1 of 1 epoch in 1 h 20 min"


def test_what_is_mistaken_most_comes_first():
    cat, ship = format_confusions(TEST, count=2)
    assert cat == " 25.0% of cat taken for [red]ship (5 of 20)"
    assert ship == " 15.0% of cat taken for dog (3 of 20)"
    perfect = dataclasses.replace(TEST, confusion_matrix=[[20, 0, 0], [0, 0, 0], [0, 0, 9]])
    assert format_confusions(perfect) == []


def test_of_many_classes_the_worst_are_shown():
    many = dataclasses.replace(TEST, per_class_accuracy={f"class{i}": (i * 7 % 100) / 100 for i in range(100)})
    heading, first, *others = format_class_bars(many)
    assert heading == "the ten worst of 100 classes:"
    assert first.split()[:2] == ["class0", "0.00%"] and len(others) == 9
    assert others[-1].split()[1] == "9.00%"


@pytest.mark.parametrize("terminal", [True, False])
def test_the_result_is_a_panel_on_a_terminal_and_plain_lines_elsewhere(terminal, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_DIST_PROGRAM", "python launch.py")
    shown = console(terminal, width=120)
    print_result(shown, SUMMARY, 20, tmp_path)
    text = text_of(shown)
    assert ("╭" in text) == terminal
    assert "in 1 h 20 min" in text
    assert "25.0% of cat taken for [red]ship" in text
    assert [line.split()[2] for line in text.splitlines()[-3:]] == ["report", "predict", "export"], "what comes next"
    assert f"\n  python launch.py report {tmp_path}\n" in text
    assert "[red]ship" in text, "a class name was taken for markup"
    assert "\x1b" not in text


def test_the_header_is_aligned_and_breaks_between_words():
    shown, narrow = console(False), console(True, width=30)
    print_header(shown, {"run": "runs/x", "learning rate": "0.1"})
    assert text_of(shown) == "run            runs/x\nlearning rate  0.1\n"
    print_header(narrow, {"device": "cpu, float32 (no fast bf16 here), 2 threads"})
    lines = [line.rstrip() for line in text_of(narrow).splitlines()]
    assert lines == ["device  cpu, float32 (no fast", "        bf16 here), 2 threads"]


def test_the_view_fits_the_console(monkeypatch):
    assert isinstance(training_display(console(True), PLAN, "original", quiet=False), LiveTraining)
    assert isinstance(training_display(console(False), PLAN, "original", quiet=False), PlainTraining)
    assert type(training_display(console(True), PLAN, "original", quiet=True)) is Display
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(training_display(console(True), PLAN, "original", quiet=False), PlainTraining)


def test_plain_training_prints_an_epoch_a_line_and_signs_of_life():
    shown, clock = console(False), Clock()
    view = PlainTraining(shown, PLAN, "original", clock)
    with view:
        view.on_epoch_start(1, 0.1)
        for step in range(1, 20):
            clock.now += 5.0 if step <= 5 else 0.1  # the first steps are slow, and do not count
            view.on_step(step, 2.0 if step == 3 else None)
        assert text_of(shown) == ""
        clock.now += 0.1
        view.on_step(20, None)
        view.on_epoch_end(record(1), True)
        clock.now = 56.0
        view.on_evaluation(10, 20)
        clock.now = 57.0
        view.on_evaluation(15, 20)
        clock.now = 99.0
        view.on_evaluation(20, 20)
    lines = text_of(shown).splitlines()
    assert lines[0].startswith("expected end ") and "in 13 min 0 s" in lines[0]
    assert lines[1].startswith("epoch  1/20  loss 1.000")
    assert lines[2] == "evaluating 15/20 images"
    clock.now = 100.0
    view.on_step(21, None)
    assert text_of(shown).splitlines()[3:] == ["epoch 1/20  step 21/391  loss 2.000"]


def test_a_long_run_is_told_what_would_be_shorter():
    shorter = "--recipe quick is made to be short; --epochs 4 would take half an hour"
    assert format_quicker(PLAN, "standard", PLAN.total_steps, 1.0) == shorter
    assert format_quicker(PLAN, "standard", 0.1 * PLAN.total_steps, 0.1) == ""
    assert "--epochs" not in format_quicker(PLAN, "standard", 10 * PLAN.total_steps, 10.0)
    assert format_quicker(PLAN, "quick", PLAN.total_steps, 1.0) == "--epochs 4 would take half an hour"


def test_the_expected_end_has_a_date_on_another_day():
    now = datetime(2026, 1, 1, 23, 0)
    assert format_end(1800, now) == "23:30"
    assert format_end(7800, now) == "2026-01-02 01:10"
    assert format_end(1e15, now).startswith("5"), "no calendar goes so far"


def test_quiet_shows_notes_only():
    shown = console(True)
    with training_display(shown, PLAN, "original", quiet=True) as view:
        view.on_epoch_start(1, 0.1)
        for step in range(1, 30):
            view.on_step(step, 1.0)
        view.on_epoch_end(record(1), False)
        view.on_note("something happened")
    assert text_of(shown) == "something happened\n"


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    ("make_view", "calls", "expected"),
    [
        (lambda shown: loading_progress(shown, "cifar10"), [(10 * 2**20, 200 * 2**20)], ["downloading cifar10", "10"]),
        (lambda shown: loading_progress(shown, "cifar10"), [(50 * 2**20, None)], ["downloading cifar10", "50", "MiB"]),
        (lambda shown: loading_progress(shown, "a[/b]c[red]d"), [(1, 2), (2, 2)], ["decoding a[/b]c[red]d"]),
        (evaluation_display, [(250, 1000)], ["evaluating", "250"]),
    ],
)
def test_a_count_is_shown_as_a_bar_or_as_lines(terminal, make_view, calls, expected, monkeypatch):
    shown = console(terminal)
    monkeypatch.setattr("cifar_dist.display.progress._SIGN_OF_LIFE_SECONDS", 0)
    with make_view(shown) as view:
        for done, total in calls:
            view.on_evaluation(done, total)
    assert all(text in text_of(shown) for text in expected)


@pytest.mark.parametrize("width", [40, 100])
def test_no_bar_is_broken_by_the_panel(width):
    sure = dataclasses.replace(TEST, per_class_accuracy=dict.fromkeys(TEST.per_class_accuracy, 1.0))
    shown = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, _environ={})
    print_lines(shown, format_class_bars(sure, width=width), title="result")
    lines = text_of(shown).splitlines()
    assert len(lines) == 2 + len(TEST.per_class_accuracy)
    assert all("█" in line and "100.00%" in line for line in lines[1:-1])
