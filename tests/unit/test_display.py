"""Text and progress on the console, in a pipe and on a terminal. Figures are tested in test_figures.py."""

import dataclasses
import io
import re
import sys
from datetime import datetime, timedelta

import pytest
from rich.console import Console

from cifar_dist.config.plan import KNOWN_SIZES, make_plan
from cifar_dist.display.progress import (
    CountProgress,
    Display,
    LiveTraining,
    PlainTraining,
    loading_progress,
    training_display,
)
from cifar_dist.display.terminal import (
    format_confusions,
    format_duration,
    format_epoch,
    format_evaluation,
    format_outcome,
    format_worst_classes,
    make_console,
    print_header,
    print_lines,
    print_result,
    print_table,
)
from cifar_dist.run.results import Evaluation, Summary
from tests.conftest import make_recipe
from tests.unit.test_metrics import record

PLAIN = make_plan(make_recipe("epochs=20"), world_size=1, sizes=KNOWN_SIZES["cifar10"], device_type="cpu")
PLAN = dataclasses.replace(PLAIN, num_validation=5000)
TEST = Evaluation(
    num_samples=20, loss=0.5, top1=0.75, top5=0.95, per_class_accuracy={"cat": 0.604, "dog": None, "[red]ship": 1.0},
    confusion_matrix=[[12, 3, 5], [0, 0, 0], [0, 0, 9]],
)  # fmt: skip
SUMMARY = Summary(
    status="early_stopped", epochs=8, best_epoch=5, train_seconds=4794.6, world_size=1, device="cpu", precision="no",
    num_threads=2, peak_memory_mib=800, test=TEST,
)  # fmt: skip


def console(terminal: bool, width: int = 100, height: int = 30) -> Console:
    size = {"width": width, "height": height}
    return Console(file=io.StringIO(), force_terminal=terminal, color_system=None, _environ={}, **size)


def text_of(shown: Console) -> str:
    return shown.file.getvalue()


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("cifar_dist.display.progress.time.monotonic", lambda: now[0])
    return now


# Lines


def test_durations():
    durations = {1.234: "1.2 s", 9.96: "10 s", 59.7: "1 min 0 s", 3599: "59 min 59 s", 3599.8: "1 h 0 min"}
    assert {seconds: format_duration(seconds) for seconds in durations} == durations


def test_an_epoch_is_one_line():
    line = format_epoch(record(3, train_loss=1.3724, train_acc=0.503), 20, is_best=False)
    assert line == "epoch  3/20  loss 1.372  acc 50.30%  lr 0.1  100 images/s  2.0 s"
    line = format_epoch(record(val_loss=0.5, val_acc=0.8), 5, is_best=True)
    assert "val loss 0.500  val acc 80.00%" in line and line.endswith("2.0 s  best")


def test_the_result_in_words():
    totals, _, cat, dog, ship, *_, first, second = format_evaluation(TEST, split="test ")
    assert totals == "test accuracy 75.00%, loss 0.5000 on 20 images"
    assert cat.split() == ["cat", "60.40%", "█" * 12]
    assert dog.split() == ["dog", "-"]
    assert ship.endswith("100.00%  " + "█" * 20)
    assert first == " 25.0% of cat taken for [red]ship (5 of 20)"
    assert second == " 15.0% of cat taken for dog (3 of 20)"
    perfect = dataclasses.replace(TEST, confusion_matrix=[[20, 0, 0], [0, 0, 0], [0, 0, 9]])
    assert format_confusions(perfect, count=3) == []
    assert format_worst_classes(perfect, count=3) == []
    outcome = "Early stopping triggered: training ended after 8 of 20 epochs in 1 h 20 min, best epoch 5"
    assert format_outcome(SUMMARY, total_epochs=20) == outcome
    one = dataclasses.replace(SUMMARY, status="completed", epochs=1, best_epoch=None)
    assert format_outcome(one, total_epochs=1) == "Training completed after 1 of 1 epoch in 1 h 20 min"


def test_the_worst_classes_come_first():
    rows = [[18, 0, 2, 0], [0, 20, 0, 0], [1, 4, 15, 0], [0, 0, 0, 0]]
    accuracies = {"cat": 0.9, "dog": 1.0, "[red]ship": 0.75, "猫": None}
    test = dataclasses.replace(TEST, per_class_accuracy=accuracies, confusion_matrix=rows)
    ship, cat = format_worst_classes(test, count=3)
    assert ship == "[red]ship   75.00%  most often taken for dog (4 of 20)"
    assert cat == "cat         90.00%  taken for [red]ship (2 of 20)"
    assert format_worst_classes(test, count=1) == ["[red]ship   75.00%  most often taken for dog (4 of 20)"]


def test_most_often_needs_a_class_that_is_taken_for_more_often_than_each_other():
    rows = [[10, 1, 1], [1, 9, 2], [0, 0, 12]]
    test = dataclasses.replace(TEST, confusion_matrix=rows, per_class_accuracy=dict.fromkeys(("蓝圆", "cat", "dog")))
    assert format_worst_classes(test, count=3) == [
        "cat    75.00%  most often taken for dog (2 of 12)",
        "蓝圆   83.33%  taken for dog and others (2 of 12)",
    ]


def test_of_many_classes_the_worst_are_shown():
    accuracies = {f"class{i}": (i * 7 % 100) / 100 for i in range(100)}
    many = dataclasses.replace(TEST, per_class_accuracy=accuracies, confusion_matrix=[[0] * 100] * 100)
    totals, _, heading, first, *others = format_evaluation(many)
    assert totals == "accuracy 75.00%, top-5 95.00%, loss 0.5000 on 20 images"
    assert heading == "the 10 worst of 100 classes:"
    assert first.split() == ["class0", "0.00%"] and len(others) == 9
    assert others[-1].split()[1] == "9.00%"


@pytest.mark.parametrize("terminal", [True, False])
def test_the_result_is_a_panel_on_a_terminal_and_plain_lines_elsewhere(terminal, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_DIST_PROGRAM", "python launch.py")
    shown = console(terminal, width=120)
    print_result(shown, SUMMARY, 20, tmp_path)
    text = text_of(shown)
    assert ("╭" in text) == terminal
    assert "test accuracy 75.00%" in text and "8 of 20 epochs" in text
    assert "cat   60.00%  most often taken for [red]ship (5 of 20)" in text, "a class name is no markup"
    assert [line.split()[2] for line in text.splitlines()[-2:]] == ["predict", "report"]
    assert f"\n  python launch.py predict --ckpt {tmp_path} IMAGE\n" in text
    assert "\x1b" not in text and "pictures" not in text
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "curves.png").touch()
    print_result(shown, SUMMARY, 20, tmp_path, font_note="note: no font")
    assert f"\npictures: {tmp_path}/figures\nnote: no font\nnext:\n" in text_of(shown)


def test_headers_and_tables_are_aligned_and_a_narrow_terminal_wraps_them():
    shown, narrow = console(False), console(True, width=30)
    print_header(shown, {"run": "runs/x", "learning rate": "0.1"})
    print_table(shown, [["run", "loss"], ["猫", "0.5"]])
    assert text_of(shown) == "run            runs/x\nlearning rate  0.1\nrun  loss\n猫    0.5\n"
    print_header(narrow, {"device": "cpu, float32 (no fast bf16 here), 2 threads"})
    lines = [line.rstrip() for line in text_of(narrow).splitlines()]
    assert lines == ["device  cpu, float32 (no fast", "        bf16 here), 2 threads"]
    rows = [["run", "status", "loss of the test"], ["[red]a b", "completed", "0.5"], ["mean of 2", "", "0.5 ± 0.1"]]
    drawn = {
        40: ["run           status  loss of the test", "[red]a b   completed               0.5"],
        33: ["run       status loss of the test", "[red]a completed              0.5", "b"],
        32: [
            "[red]a b",
            "  status            completed",
            "  loss of the test  0.5",
            "mean of 2",
            "  loss of the test  0.5 ± 0.1",
        ],
    }
    for width, expected in drawn.items():
        narrow = console(True, width=width)
        print_table(narrow, rows)
        assert [line.rstrip() for line in text_of(narrow).splitlines()][: len(expected)] == expected


def test_a_title_that_is_too_long_for_the_border_is_in_the_panel():
    for length, above in ((54, True), (55, False)):
        shown, title = console(True, width=60), "x" * (length - 5) + " test"
        print_lines(shown, ["accuracy"], title=title)
        first, second, *_ = text_of(shown).splitlines()
        assert (title in first, title in second) == (above, not above)


def test_bars_have_the_colours_of_the_terminal(monkeypatch, capsys):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    view = LiveTraining(make_console(), PLAN, "cpu", lambda: None)
    view.on_epoch_start(1)
    view.on_step(40, 1.0)
    view.console.print(view.progress)
    codes = set(re.findall(r"\x1b\[([\d;]+)m", capsys.readouterr().out))
    assert {"2", "32"} <= codes and not [code for code in codes if ";" in code], codes


# Plain lines


def test_the_view_fits_the_console():
    assert isinstance(training_display(console(True), PLAN, quiet=False), LiveTraining)
    assert isinstance(training_display(console(False), PLAN, quiet=False), PlainTraining)
    assert type(training_display(console(True), PLAN, quiet=True)) is Display
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert isinstance(training_display(dumb, PLAN, quiet=False), PlainTraining)


def test_plain_training_prints_an_epoch_a_line_and_signs_of_life(clock):
    shown = console(False)
    with training_display(shown, PLAN, quiet=False) as view:
        view.on_epoch_start(2)
        for clock[0], step in ((10.0, 101), (20.0, 102), (40.0, 103)):  # a resumed run
            view.on_step(step, 2.0 if step == 102 else None)
        expected = datetime.now() + timedelta(seconds=(7820 - 782) * 40 / 3)
        view.on_epoch_end(record(2, step=782), True)
        for clock[0], done in ((69.0, 10), (70.0, 15), (110.0, 20)):
            view.on_evaluation(done, 20)
        clock[0] = 1e15
        view.on_epoch_end(record(3, step=1173), False)
        view.on_epoch_start(20)
        view.on_step(350, 2.0)
        clock[0] += 40.0  # a step in 40 s, and one is left
        view.on_step(389, None)
        view.on_epoch_end(record(20, step=7820), False)
    step, first, evaluation, second, soon, last = text_of(shown).splitlines()
    assert re.fullmatch(r"epoch 2/20  step 103/391  loss 2.000  ends about \w{3} \d\d \d\d:\d\d", step)
    assert first.startswith("epoch  2/20  loss 1.000") and first.endswith("  best")
    end = datetime.strptime(f"{expected.year} {re.search('ends about (.+)  best', first)[1]}", "%Y %b %d %H:%M")
    assert abs(end - expected) < timedelta(minutes=2)
    assert evaluation == "evaluating 15/20 images"
    assert "  ends about " in second, "no calendar goes so far"
    assert soon == "epoch 20/20  step 389/391  loss 2.000" and "ends" not in last, "it ends within a minute"


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    ("make_view", "calls", "expected"),
    [
        (lambda shown: loading_progress(shown, "cifar10"), [(50 * 2**20, None)], ["downloading cifar10", "50", "MiB"]),
        (lambda shown: loading_progress(shown, "a[/b]c[red]d"), [(1, 2), (2, 2)], ["decoding a[/b]c[red]d"]),
        (lambda shown: CountProgress(shown, "evaluating", unit="images"), [(250, 1000)], ["evaluating", "250"]),
    ],
)
def test_a_count_is_shown_as_a_bar_or_as_lines(terminal, make_view, calls, expected, monkeypatch):
    shown = console(terminal)
    monkeypatch.setattr("cifar_dist.display.progress._HEARTBEAT_SECONDS", 0)
    with make_view(shown) as view:
        for done, total in calls:
            view.on_evaluation(done, total)
    assert all(text in text_of(shown) for text in expected)


# The live view


def view_on(console: Console, memory=lambda: 1210) -> LiveTraining:
    return training_display(console, PLAN, quiet=False, facts="cpu, bf16 · 2 processes", memory=memory)


def drawn(view, width: int = 100, height: int = 30) -> list[str]:
    """Return the lines that are drawn in place."""
    paper = console(True, width, height)
    view.console.width = width
    paper.print(view)
    return text_of(paper).splitlines()


def epochs_in(lines: list[str]) -> dict[str, str]:
    """The epochs of the table, and the last cell of each."""
    rows = [line.split() for line in lines if re.match(r" *\d+ +\d", line)]
    return {row[0]: row[-1] for row in rows}


def train(view, epochs: int, best: int = 2) -> None:
    for epoch in range(1, epochs + 1):
        view.on_epoch_start(epoch)
        for step in range(1, 41):
            view.on_step(step, 1.5 if step == 40 else None)
        for done in (1000, 5000):
            view.on_evaluation(done, 5000)
        view.on_epoch_end(record(epoch, val_loss=0.5, val_acc=epoch / 100), epoch <= best)


def test_it_shows_progress_rates_and_the_device(clock):
    view = view_on(console(True))
    view.progress.get_time = lambda: clock[0]
    view.on_epoch_start(1)
    assert "waiting for the first step" in "".join(drawn(view))
    train(view, 2)
    view.on_epoch_start(3)
    for step in range(1, 11):
        clock[0] += 0.5
        view.on_step(step, 1.25)
    _, facts, *heading, first, second, _, run, steps = drawn(view)
    assert facts.rstrip() == "loss 1.250 · 256 images/s · 1,210 MiB · cpu, bf16 · 2 processes"
    assert " ".join(heading).split() == "train train val val images epoch loss acc loss acc lr /s time".split()
    view.plan = PLAIN
    assert "val" not in "".join(drawn(view)), "without a validation split its columns are left out"
    assert first.split() == ["1", "1.000", "50.00%", "0.500", "1.00%", "0.1", "100", "2.0", "s"]
    assert second.split()[-1] == "best"
    assert run.split()[0] == "run" and run.rstrip().endswith(" 792/7820 left 45 s")
    assert steps.startswith("epoch 3/20") and "10/391" in steps


def test_a_resumed_run_shows_its_earlier_epochs_and_the_speed_of_its_own_steps(clock):
    view = view_on(console(True))
    view.progress.get_time = lambda: clock[0]
    view.on_earlier_epochs([record(epoch, val_loss=0.5, val_acc=0.5) for epoch in (1, 2, 3)], 2)
    view.on_epoch_start(4)
    assert epochs_in(drawn(view)) == {"1": "s", "2": "best", "3": "s"}
    for step in range(301, 311):
        clock[0] += 1.0
        view.on_step(step, 1.0 if step == 310 else None)
    run, steps = view.progress.tasks[:2]
    assert run.speed == steps.speed == pytest.approx(1.0)
    assert run.completed == 3 * 391 + 310 and steps.completed == 310


def test_each_evaluation_has_a_bar_until_it_ends():
    view = view_on(console(True))
    for _ in range(2):
        for done in (1000, 2000, 3000, 5000):
            view.on_evaluation(done, 5000)
            assert (f"{done}/5000" in "".join(drawn(view))) == (done < 5000)


def test_the_best_epoch_stays_in_sight_and_a_low_terminal_shows_less():
    view = view_on(console(True))
    train(view, 40)
    assert list(epochs_in(drawn(view, height=60))) == ["2", *map(str, range(12, 41))]
    assert epochs_in(drawn(view))["2"] == "best"
    assert len(drawn(view, height=14)) == 12 and len(drawn(view, height=9)) == 8


@pytest.mark.parametrize("width", [40, 60, 80])
def test_nothing_is_wider_than_the_terminal_and_whole_columns_are_left_out(width):
    view = view_on(console(True, width))
    train(view, 3)
    best = {"val_acc": 1.0, "train_acc": 1.0, "lr": 0.01234, "images_per_second": 12345, "epoch_seconds": 123}
    view.best = view.epochs[0] = record(1, val_loss=0.5, **best)
    lines = drawn(view, width)
    assert max(map(len, lines)) <= width
    assert len(lines) == 10, "a line was broken"
    cells = {
        80: "1 1.000 100.00% 0.500 100.00% 0.01234 12,345 2 min 3 s best",
        60: "1 1.000 100.00% 0.500 100.00% 0.01234 2 min 3 s best",
        40: "1 1.000 0.500 100.00% 2 min 3 s best",
    }
    assert lines[4].split() == cells[width].split()
    assert "…" not in "".join(lines[2:])


def test_notes_and_prints_go_above_and_the_table_stays_at_the_end(capsys):
    shown = console(True, 60)
    with view_on(shown) as view:
        train(view, 1)
        view.on_note("a line that is longer than the terminal is wide, and that has [brackets] in it")
        print("printed by a library")
        print("told by a library", file=sys.stderr)
        train(view, 4)
    text = text_of(shown)
    for expected in ("has [brackets] in it", "printed by a library", "told by a library"):
        assert expected in text, expected
    assert [line.split()[0] for line in text.splitlines()[-4:]] == ["1", "2", "3", "4"]
    assert capsys.readouterr() == ("", "")
