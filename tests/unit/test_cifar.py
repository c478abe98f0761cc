"""The official CIFAR files found, unpacked, downloaded and refused, with a small archive of their layout."""

import errno
import hashlib
import io
import os
import pickle
import tarfile
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from cifar_dist.config.errors import UserError
from cifar_dist.data import cifar
from cifar_dist.data.cifar import CIFAR10, CIFAR100, HOSTS, Archive, load_archive, where_found
from cifar_dist.data.dataset import Dataset
from tests.unit.test_checkpoint import Payload

PER_FILE = 20


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def python2_pickle(pixels: np.ndarray, **labels: list[int]) -> bytes:
    """Return the bytes that Python 2 and NumPy 1 wrote: protocol 2, with str (now bytes) and numpy.core."""

    def string(text: bytes) -> bytes:  # BINSTRING, which Python 3 reads and no longer writes
        return b"T" + len(text).to_bytes(4, "little") + text

    shape = b"".join(b"M" + size.to_bytes(2, "little") for size in pixels.shape)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + string(b"b") + b"tR"
        b"(K\x01" + shape + b"\x86cnumpy\ndtype\n(" + string(b"u1") + b"K\x00K\x01tR"
        b"(K\x03"
        + string(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + string(pixels.tobytes())
        + b"tb"
    )
    content = b"\x80\x02}(" + string(b"batch_label") + string(b"batch 1 of 1") + string(b"data") + array
    for key, values in labels.items():
        content += string(key.encode()) + b"](" + b"".join(b"K" + bytes([value]) for value in values) + b"e"
    return content + b"u."


def tarball_of(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


RANDOM = np.random.default_rng(0)
PIXELS = {name: RANDOM.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8) for name in ("batch_1", "batch_2", "test")}
LABELS = {name: RANDOM.integers(0, 10, PER_FILE).tolist() for name in PIXELS}
FILES = {name: python2_pickle(PIXELS[name], coarse=[7] * PER_FILE, fine=LABELS[name]) for name in PIXELS}
FILES["meta"] = b"not read"
UNPACKED = {f"fake-batches/{name}": content for name, content in FILES.items()}
TARBALL = tarball_of(UNPACKED)
FAKE = Archive(
    name="fake",
    class_names=tuple("abcdefghij"),
    folder="fake-batches",
    train={name: md5(FILES[name]) for name in ("batch_1", "batch_2")},
    test={"test": md5(FILES["test"])},
    label_key=b"fine",
    tarball="fake.tar.gz",
    tarball_md5=md5(TARBALL),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The unpacked files, and the tarball beside them."""
    folder = tmp_path / "fake-batches"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (tmp_path / "fake.tar.gz").write_bytes(TARBALL)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder, but for the lock's."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def check(dataset: Dataset) -> None:
    for part, batches in ((dataset.train, ["batch_1", "batch_2"]), (dataset.test, ["test"])):
        pixels = np.concatenate([PIXELS[name] for name in batches]).reshape(-1, 3, 32, 32)
        assert np.array_equal(part.images.numpy(), pixels)
        assert part.labels.tolist() == [label for name in batches for label in LABELS[name]]
    assert (dataset.name, dataset.class_names) == ("fake", tuple("abcdefghij"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR_DIST_FAKE_URLS", "")


def refused(data_dir: Path, archive: Archive = FAKE) -> str:
    """Return the one line of the refusal, which changes nothing on disk."""
    before = tree(data_dir)
    with pytest.raises(UserError) as caught:
        load_archive(archive, data_dir)
    assert tree(data_dir) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read_only(*args: object, **kwargs: object) -> int:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


# The folder


def test_whole_folder_is_read_in_order_without_network_or_writing(tmp_path, folder, monkeypatch):
    (tmp_path / "fake.tar.gz").unlink()
    (folder / "meta").unlink()  # it holds no images
    monkeypatch.setattr(os, "open", read_only)
    for named in (tmp_path, folder):  # the files' own folder may be named, too
        check(load_archive(FAKE, named))
        assert where_found(FAKE, named) == f"found: {folder}"
    assert tree(tmp_path) == {name: content for name, content in UNPACKED.items() if "meta" not in name}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("batch_1", FILES["batch_1"][:-1]),
        ("batch_2", FILES["batch_2"][:500] + b"!" + FILES["batch_2"][501:]),
        ("test", b""),
    ],
    ids=["truncated", "tampered", "empty"],
)
def test_damaged_file_is_named_and_left_alone(folder, name, content):
    (folder / name).write_bytes(content)
    assert f"wrong md5, so damaged or not official: {folder / name} (left alone;" in refused(folder.parent)


def test_file_that_cannot_be_read_is_named_and_not_overwritten(folder):
    (folder / "test").unlink()
    (folder / "test").symlink_to("nowhere")
    assert refused(folder.parent) == f"cannot read {folder / 'test'}: No such file or directory"


def test_missing_files_are_named_with_the_ways_out(folder, monkeypatch):
    for path in (folder / "batch_2", folder / "test", folder.parent / "fake.tar.gz"):
        path.unlink()
    monkeypatch.chdir(folder.parent)  # a relative folder is shown as an absolute one
    text = refused(Path())
    assert text.startswith(f"the download failed (there is no address to ask), and {folder} lacks batch_2, test; put ")
    for way in (
        f"put fake.tar.gz or the folder fake-batches into {folder.parent},",
        "--data-dir DIR",
        "CIFAR_DIST_FAKE_URLS",
    ):
        assert way in text
    assert "--dataset shapes" in text


def test_missing_files_come_from_the_tarball_and_good_ones_stay(folder):
    (folder / "batch_2").unlink()
    before = (folder / "batch_1").stat()
    check(load_archive(FAKE, folder.parent))
    after = (folder / "batch_1").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert tree(folder.parent) == UNPACKED | {"fake.tar.gz": TARBALL}


# The pickles


def test_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, folder):
    content = pickle.dumps(Payload(tmp_path / "ran"), protocol=2)
    (folder / "test").write_bytes(content)
    text = refused(tmp_path, replace(FAKE, test={"test": md5(content)}))
    assert not (tmp_path / "ran").exists()
    assert "would run code (" in text and "getattr" in text
    pickle.loads(content)  # the payload works where nothing prevents it
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    ["builtins eval", "numpy load", "numpy.core.multiarray scalar", "numpy.testing ndarray", "numpy ndarray.dump"],
)
def test_pickles_load_only_the_three_names_of_an_array(folder, name):
    content = b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n."
    (folder / "test").write_bytes(content)
    archive = replace(FAKE, test={"test": md5(content)})
    assert f"would run code ({name.replace(' ', '.')})" in refused(folder.parent, archive)


# The tarball


def test_wrong_tarball_is_named_and_left_alone(tmp_path):
    (tmp_path / "fake.tar.gz").write_bytes(TARBALL[:-1])
    assert f"not official: {tmp_path / 'fake.tar.gz'} (left alone" in refused(tmp_path)


def test_file_gets_its_name_when_it_is_whole(tmp_path, monkeypatch):
    (tmp_path / "fake.tar.gz").write_bytes(TARBALL)
    renamed, rename = [], Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        assert not target.exists() and self.read_bytes() == FILES[target.name]
        renamed.append(target.name)
        if len(renamed) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_archive(FAKE, tmp_path)
    first = f"fake-batches/{renamed[0]}"
    assert tree(tmp_path) == {"fake.tar.gz": TARBALL, first: UNPACKED[first]}
    check(load_archive(FAKE, tmp_path))


# The network


def test_unwritable_folder_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "open", read_only)
    assert refused(tmp_path / "new").startswith(f"cannot write {tmp_path / 'new'}: Read-only file system; ")


def test_two_at_a_time_make_the_folder_and_download_once(tmp_path, monkeypatch):
    """Threads stand for processes: each opens the lock file itself, and the lock belongs to the open file."""
    requests: list[list[str]] = []
    asked, answer = threading.Event(), threading.Event()

    def download(urls: list[str], target: Path, expected: str, *, progress: object) -> None:
        requests.append(urls)
        asked.set()
        assert answer.wait(60) and expected == md5(TARBALL)
        target.write_bytes(TARBALL)

    monkeypatch.setattr(cifar, "download", download)
    monkeypatch.setenv("CIFAR_DIST_FAKE_URLS", " http://one/x,\n http://two/x , ")  # as users separate them
    results: list[Dataset] = []
    threads = [threading.Thread(target=lambda: results.append(load_archive(FAKE, tmp_path / "new"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert asked.wait(60)
    threads[0].join(0.2)  # time for the other to ask, too, if nothing stopped it
    answer.set()
    for thread in threads:
        thread.join()
    assert requests == [["http://one/x", "http://two/x"]] and len(results) == 2
    for dataset in results:
        check(dataset)
    assert tree(tmp_path / "new") == UNPACKED | {"fake.tar.gz": TARBALL}


# CIFAR-10 and CIFAR-100 themselves


@pytest.mark.parametrize(
    ("archive", "reference", "num_classes"),
    [(CIFAR10, torchvision.datasets.CIFAR10, 10), (CIFAR100, torchvision.datasets.CIFAR100, 100)],
)
def test_archives_are_described_as_in_torchvision(archive, reference, num_classes):
    assert (archive.folder, archive.tarball) == (reference.base_folder, reference.filename)
    assert (archive.tarball_md5, f"{HOSTS[-1]}/{archive.tarball}") == (reference.tgz_md5, reference.url)
    assert [list(file) for file in archive.train.items()] == reference.train_list
    assert [list(file) for file in archive.test.items()] == reference.test_list
    assert archive.class_names == tuple(sorted(set(archive.class_names)))  # officially, both are in that order
    assert len(archive.class_names) == num_classes
    assert all(host.startswith("https://") for host in HOSTS)
    assert archive.label_key == (b"labels" if num_classes == 10 else b"fine_labels")


@pytest.mark.full
@pytest.mark.official
def test_official_files_are_read_as_torchvision_reads_them(official_data):
    dataset = load_archive(CIFAR10, official_data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision unpickles through numpy.core
        for part, train in ((dataset.train, True), (dataset.test, False)):
            reference = torchvision.datasets.CIFAR10(official_data, train=train, download=False)
            assert torch.equal(part.images, torch.from_numpy(reference.data).permute(0, 3, 1, 2))
            assert part.labels.tolist() == reference.targets
            assert list(dataset.class_names) == reference.classes
