"""The live view of a training on a terminal."""

import dataclasses
import io
import logging
import re
import sys

import pytest
from rich.console import Console

from cifar_dist.config.plan import KNOWN_SIZES, make_plan
from cifar_dist.display.live import training_display
from tests.conftest import make_recipe
from tests.unit.test_metrics import record

PLAIN = make_plan(make_recipe("epochs=20"), world_size=1, sizes=KNOWN_SIZES["cifar10"], device_type="cpu")
PLAN = dataclasses.replace(PLAIN, num_validation=5000)


def terminal(width: int = 100, height: int = 30, **named) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, _environ={}, **named)


def view_on(console: Console, memory=lambda: 1210):
    return training_display(console, PLAN, "original", quiet=False, facts="cpu, bf16 · 2 processes", memory=memory)


def drawn(view, width: int = 100, height: int = 30) -> list[str]:
    """What is drawn in place at this moment, a line each."""
    paper = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    view.console.width = width
    paper.print(view)
    return paper.file.getvalue().splitlines()


def train(view, epochs: int, best: int = 2) -> None:
    for epoch in range(1, epochs + 1):
        view.on_epoch_start(epoch, 0.1)
        for step in range(1, 41):
            view.on_step(step, 1.5 if step == 40 else None)
        for done in (1000, 5000):
            view.on_evaluation(done, 5000)
        view.on_epoch_end(record(epoch, val_loss=0.5, val_acc=epoch / 100), epoch <= best)


def test_it_shows_progress_rates_and_the_device():
    view = view_on(terminal())
    view.on_epoch_start(1, 0.1)
    assert "the first step is on its way" in "".join(drawn(view))
    train(view, 2)
    view.on_epoch_start(3, 0.05)
    view.on_step(10, 1.25)
    _, facts, heading, first, second, _, run, steps = drawn(view)
    assert facts.rstrip().endswith(" images/s · 1,210 MiB · cpu, bf16 · 2 processes")
    assert re.split(r"\s{2,}", heading.strip()) == [
        "epoch", "train loss", "train acc", "val loss", "val acc", "lr", "images/s", "time"
    ]  # fmt: skip
    assert first.split() == ["1", "1.000", "50.00%", "0.500", "1.00%", "0.1", "100", "2.0", "s"]
    assert second.split()[-1] == "best" and "best" not in first
    assert run.split()[0] == "run" and "792/7820" in run
    assert steps.startswith("epoch 3/20") and "10/391" in steps and "loss 1.250  lr 0.05" in steps


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("cifar_dist.display.live.time.monotonic", lambda: now[0])
    return now


def test_the_speed_of_a_resumed_run_counts_its_own_steps_only(clock):
    """Else the expected end would be far too soon."""
    view = view_on(terminal())
    view.progress.get_time = lambda: clock[0]
    view.on_epoch_start(5, 0.1)
    for step in range(301, 311):
        clock[0] += 1.0
        view.on_step(step, 1.0 if step == 310 else None)
    run, steps = (view.progress._tasks[task] for task in (view.run, view.steps))
    assert run.speed == steps.speed == pytest.approx(1.0)
    assert run.completed == 4 * 391 + 310 and steps.completed == 310
    assert view.rate == 128


def test_each_evaluation_has_a_bar_until_it_ends(clock):
    view = view_on(terminal())
    view.progress.get_time = lambda: clock[0]
    for _ in range(2):
        for done in (1000, 2000, 3000, 5000):
            clock[0] += 1.0
            view.on_evaluation(done, 5000)
            assert view.progress._tasks[view.evaluation].finished == (done == 5000)
            assert (f"{done}/5000" in "".join(drawn(view))) == (done < 5000)


def test_a_resumed_run_shows_its_earlier_epochs():
    view = view_on(terminal())
    view.on_earlier_epochs([record(epoch, val_loss=0.5, val_acc=0.5) for epoch in (1, 2, 3)], 2)
    view.on_epoch_start(4, 0.1)
    rows = [line.split() for line in drawn(view) if re.match(r" *\d+ +\d", line)]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert [row[0] for row in rows if row[-1] == "best"] == ["2"]


def test_without_a_validation_split_its_columns_are_left_out():
    view = training_display(terminal(), PLAIN, "original", quiet=False)
    view.on_epoch_start(1, 0.1)
    view.on_epoch_end(record(1), False)
    assert "train acc" in "".join(drawn(view)) and "val" not in "".join(drawn(view))


def test_the_best_epoch_stays_in_sight_and_a_low_terminal_shows_less():
    view = view_on(terminal())
    train(view, 12)
    rows = [line.split() for line in drawn(view) if re.match(r" *\d+ +\d", line)]
    assert [row[0] for row in rows] == ["2", "8", "9", "10", "11", "12"]
    assert [row[0] for row in rows if row[-1] == "best"] == ["2"]
    assert len(drawn(view, height=9)) == 7
    assert len(drawn(view, height=13)) == 10
    assert len(drawn(view, height=14)) == 12


@pytest.mark.parametrize("width", [20, 40, 60, 80])
def test_nothing_is_wider_than_the_terminal(width):
    view = view_on(terminal(width))
    train(view, 3)
    lines = drawn(view, width)
    assert max(map(len, lines)) <= width
    assert len(lines) == 9 + (0 if width == 80 else 1 if width == 60 else 2), "a line was broken"
    assert any("best" in line for line in lines) == (width >= 40)
    assert any("loss 1.500  lr 0.1" in line for line in lines)


def test_at_60_columns_nothing_is_left_out_and_at_40_it_is_named():
    view = view_on(terminal(60))
    train(view, 3)
    heading = " ".join(drawn(view, 60)[2:4]).split()
    assert {"lr", "images", "/s", "time"} <= set(heading)
    assert "too narrow" not in "".join(drawn(view, 60))
    assert any(line.strip() == "too narrow for time, lr, images/s" for line in drawn(view, 40))


def test_the_expected_end_is_shown_and_kept_up_to_date(monkeypatch):
    monkeypatch.setattr("cifar_dist.display.progress.format_end", lambda seconds, now: f"in {seconds:.0f} s")
    view = view_on(terminal())
    seconds = [0.0]
    view.end.clock = lambda: seconds[0]
    for epoch, pace in ((1, 1.0), (2, 2.0)):
        view.on_epoch_start(epoch, 0.1)
        assert ("end in" in "".join(drawn(view))) == (epoch == 2)
        for step in range(1, 392):
            seconds[0] += pace
            view.on_step(step, None)
        view.on_epoch_end(record(epoch, step=391 * epoch, val_loss=0.5, val_acc=0.5), False)
        assert f"end in {(20 - epoch) * 391 * pace:.0f} s" in "".join(drawn(view))


def test_notes_prints_and_logs_go_above_and_the_table_stays_at_the_end(capsys):
    console = terminal(60, color_system=None)
    logger, handler = logging.getLogger("a.library"), logging.StreamHandler()  # made before the view is there
    logger.addHandler(handler)
    with view_on(console) as view:
        train(view, 1)
        view.on_note("a line that is longer than the terminal is wide, and that has [brackets] in it")
        print("printed by a library")
        print("told by a library", file=sys.stderr)
        logger.warning("logged by a library")
        train(view, 4)
    assert handler.stream is sys.stderr, "it has its own stream again"
    logger.removeHandler(handler)
    text = console.file.getvalue()
    for expected in ("has [brackets] in it", "printed by a library", "told by a library", "logged by a library"):
        assert expected in text, expected
    end = [line.split()[0] for line in text.splitlines()[-4:]]
    assert end == ["1", "2", "3", "4"]
    assert capsys.readouterr() == ("", "")


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=30)
    with view_on(console) as view:
        train(view, 3)
    text = console.file.getvalue()
    assert "best" in text and not re.search(r"\x1b\[(1;)?32m", text)


def test_an_exception_ends_the_view_and_shows_the_cursor():
    console = terminal()
    with pytest.raises(KeyboardInterrupt), view_on(console) as view:
        train(view, 1)
        raise KeyboardInterrupt
    assert not view.live.is_started
    assert console.file.getvalue().rindex("\x1b[?25h") > console.file.getvalue().rindex("\x1b[?25l"), "no cursor"
