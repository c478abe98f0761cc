"""Checkpoints: atomic, verified, and never run."""

import contextlib
import errno
import io
import os
import pickle
import stat
import zipfile
from pathlib import Path

import pytest
import torch

from cifar_dist.config.errors import UserError
from cifar_dist.run.checkpoint import is_bare_weights, load_checkpoint, save_checkpoint

CONTENT = {"model": {"weight": torch.arange(6.0)}, "epoch": 3, "best": None, "names": ["a", "b"]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.pt"


@pytest.mark.parametrize("links", [True, False])
def test_the_predecessor_is_kept(path, monkeypatch, links):
    def no_links(*_):
        raise OSError("no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    previous = path.with_name("previous.pt")
    for epoch in (1, 2, 3):
        save_checkpoint(path, {"epoch": epoch}, previous=previous)
    assert (load_checkpoint(path)["epoch"], load_checkpoint(previous)["epoch"]) == (3, 2)
    assert sorted(file.name for file in path.parent.iterdir()) == ["last.pt", "previous.pt"]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bare_state_dict_is_recognised(path, zipped):
    torch.save({"fc.weight": torch.zeros(2, 3)}, path, _use_new_zipfile_serialization=zipped)
    content = load_checkpoint(path)
    assert is_bare_weights(content)
    assert list(content) == ["fc.weight"]


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "flipped":
        with zipfile.ZipFile(path) as archive:
            entry = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
        start = entry.header_offset
        name_length, extra_length = (int.from_bytes(data[start + at : start + at + 2], "little") for at in (26, 28))
        data[start + 30 + name_length + extra_length] ^= 1
    changed = {"truncated": data[: len(data) // 2], "empty": b"", "foreign": b"hello, I am text", "flipped": data}
    path.unlink() if kind == "missing" else path.write_bytes(changed[kind])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "is damaged: it ends too early"),
        ("empty", "is empty"),
        ("missing", "No such file"),
        ("foreign", "is not a file that torch.save wrote"),
        ("flipped", "is damaged: the checksum of .*data/0 is wrong"),
    ],
)
def test_a_damaged_file_is_named(path, kind, message):
    save_checkpoint(path, CONTENT)
    damage(path, kind)
    with pytest.raises(UserError, match=rf"last\.pt:? {message}"):
        load_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(path, tmp_path, zipped):
    marker = tmp_path / "ran"
    if zipped:
        torch.save({"model": Payload(marker)}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Payload(marker)}, protocol=2))
    with pytest.raises(UserError, match=r"last\.pt is refused: .* could run code \(getattr\)|\(.*Path\.touch"):
        load_checkpoint(path)
    assert not marker.exists()
    if zipped:  # the payload works: only our way of reading kept it from running
        torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
        assert marker.exists()


def test_no_flipped_bit_is_a_traceback(path):
    """Those of the zip's own words on its parts included: how they are packed, whether they are encrypted."""
    save_checkpoint(path, {"model": {"weight": torch.arange(3.0)}})
    data = path.read_bytes()
    first, index = data.index(b"PK\x01\x02"), data.rindex(b"PK\x01\x02")
    for place in (*range(46), *range(first, first + 46), *range(index, len(data))):
        for bit in (0, 3, 6):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            with contextlib.suppress(UserError):
                assert torch.equal(load_checkpoint(path)["model"]["weight"], torch.arange(3.0))


def test_a_file_system_that_cannot_sync_folders_will_do(path, monkeypatch):
    original = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    save_checkpoint(path, CONTENT)
    assert load_checkpoint(path)["epoch"] == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [({"format_version": 99}, "has format 99, and this version reads 3"), ([1, 2], "holds no state dict")],
)
def test_what_this_version_does_not_read_is_refused(path, content, message):
    torch.save(content, path)
    with pytest.raises(UserError, match=message):
        load_checkpoint(path)
