"""A readable checkpoint remains if a system call fails while a run is saved: each call fails once."""

import errno
import os
from itertools import groupby
from pathlib import Path

import pytest
import torch

from cifar_dist.run.checkpoint import load_checkpoint, save_checkpoint
from cifar_dist.run.directory import RunDirectory, load_newest
from cifar_dist.run.prepare import RunRecorder
from tests.runs import make_metadata, make_recorder
from tests.unit.test_metrics import record
from tests.unit.test_run_directory import state_at


class Disk:
    """Counts the calls by which something is written. A call fails if `fails(number, name)`."""

    def __init__(self, monkeypatch, error=None, *, fails=lambda number, name: False):
        self.calls: list[str] = []
        self.error, self.fails = error, fails
        for target, name in ((os, "fsync"), (os, "link"), (os, "open"), (Path, "replace"), (Path, "unlink")):
            monkeypatch.setattr(target, name, self.counted(name, getattr(target, name)))
        opened = Path.open
        monkeypatch.setattr(Path, "open", lambda path, mode="r", *a, **k: self.file(opened, path, mode, *a, **k))

    def counted(self, name, original):
        def call(*arguments, **named):
            if name != "unlink" or not str(arguments[0]).endswith(".tmp"):  # cleaning up works
                self.count(name)
            return original(*arguments, **named)

        return call

    def file(self, opened, path, mode, *arguments, **named):
        if not {"w", "a"} & set(mode):
            return opened(path, mode, *arguments, **named)
        self.count("creat")
        return File(self, opened(path, mode, *arguments, **named))

    def count(self, name: str) -> None:
        number = len(self.calls)
        self.calls.append(name)
        if self.fails(number, name):
            raise OSError(self.error, os.strerror(self.error))


class File:
    """An open file whose calls are counted."""

    def __init__(self, disk: Disk, file) -> None:
        self.disk, self.file = disk, file

    def write(self, data):
        self.disk.count("write")
        return self.file.write(data)

    def flush(self):
        self.disk.count("flush")
        self.file.flush()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.file.close()
        if kind is None:
            self.disk.count("close")  # a disk over a network may keep its bad news until then


def begin(folder: Path) -> tuple[RunDirectory, RunRecorder]:
    """A run with two epochs saved."""
    run = RunDirectory(folder / "run")
    run.path.mkdir()
    run.last.parent.mkdir()
    recorder = make_recorder(run, make_metadata(checkpoint_every_minutes=1e-9))
    for epoch in (1, 2):
        finish_epoch(run, recorder, epoch)
    return run, recorder


def finish_epoch(run: RunDirectory, recorder: RunRecorder, epoch: int) -> None:
    run.append_record(record(epoch))
    recorder.save(state_at(epoch, best=epoch))


def calls_of_an_epoch(folder: Path) -> list[tuple[int, str]]:
    """Return the calls of an epoch with their numbers: of a row of equal ones the first and the last."""
    folder.mkdir()
    run, recorder = begin(folder)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        finish_epoch(run, recorder, 3)
    rows = [list(row) for _, row in groupby(enumerate(disk.calls), key=lambda each: each[1])]
    return [each for row in rows for each in dict.fromkeys((row[0], row[-1]))]


def assert_nothing_is_lost(run: RunDirectory, call: str) -> None:
    for path in run.last.parent.glob("*.pt"):
        load_checkpoint(path)  # none is half-written
    assert run.last.exists(), call
    checkpoint, _ = load_newest(run, load_checkpoint)
    assert checkpoint["epoch"] >= 2, call
    assert [each.epoch for each in run.read_records()][:2] == [1, 2], call


def test_every_call_is_known(tmp_path):
    """A file is on the disk before it gets its name. The tests below make each of these calls fail."""
    calls = [call for call, _ in groupby(call for _, call in calls_of_an_epoch(tmp_path / "count"))]
    record_is_added = ["creat", "write", "flush", "fsync", "close"]
    file_is_written = ["creat", "write", "flush", "fsync", "close", "replace", "open", "fsync"]
    assert calls == [*record_is_added, "link", "replace", *file_is_written, *file_is_written]


@pytest.mark.parametrize("stays", [False, True], ids=["once", "from then on"])
def test_a_call_that_fails_loses_nothing(tmp_path, stays):
    failed = set()
    for number, call in calls_of_an_epoch(tmp_path / "count"):
        folder = tmp_path / str(number)
        folder.mkdir()
        run, recorder = begin(folder)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, errno.ENOSPC, fails=lambda now, _, at=number: now == at or (stays and now > at))
            try:
                finish_epoch(run, recorder, 3)
            except OSError as raised:
                assert raised.errno == errno.ENOSPC
                failed.add(call)
        assert_nothing_is_lost(run, f"{number}: {call}")
        assert not list(run.path.rglob("*.tmp")), call
        run.truncate_records(2)
        finish_epoch(run, recorder, 4)  # the disk has room again
        assert load_checkpoint(run.last)["epoch"] == 4
    # Without links the file is renamed, and a folder that cannot be opened is not synced: these two may fail.
    assert failed >= {"creat", "write", "flush", "fsync", "close", "replace"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("numbers", [10, 1_000_000])
def test_a_disk_that_is_really_full_gives_its_own_error(tmp_path, numbers):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})
    path.with_name(f".last.pt.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(path, {"model": {"weight": torch.zeros(numbers)}})
    assert load_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("came", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt("a second one")])
def test_torchs_writer_does_not_hide_what_came_between_its_steps(tmp_path, monkeypatch, came):
    """It reports a write that stopped half way as a position that it did not expect."""

    def save(content, file):
        try:
            raise came
        finally:
            raise RuntimeError("unexpected pos 832 vs 726")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(type(came), match=r"No space left|a second one"):
        save_checkpoint(tmp_path / "last.pt", {"epoch": 1})
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        save_checkpoint(tmp_path / "last.pt", {"epoch": 1})
