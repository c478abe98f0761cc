"""The CIFAR files, found, unpacked, downloaded and refused: with a small archive of the official layout."""

import errno
import hashlib
import io
import os
import pickle
import re
import tarfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from cifar_dist.config.errors import UserError
from cifar_dist.data import download
from cifar_dist.data.archives import CIFAR10, CIFAR100, Archive, ArchiveFile
from cifar_dist.data.cifar import load_archive
from cifar_dist.data.dataset import Dataset

PER_FILE = 20


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def python2_pickle(pixels: np.ndarray, labels: list[int], coarse: list[int] | None = None) -> bytes:
    """Give the bytes that Python 2 and NumPy 1 wrote: protocol 2, with str (now bytes) and numpy.core.

    With coarse labels, the keys are those of CIFAR-100.
    """

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

    def numbers(values: list[int]) -> bytes:
        return b"](" + b"".join(b"K" + bytes([value]) for value in values) + b"e"

    items = {b"data": array, b"labels": numbers(labels)}
    if coarse is not None:
        names = b"](" + b"".join(string(b"image_%d.png" % index) for index in range(len(pixels))) + b"e"
        items = {
            b"filenames": names,
            b"batch_label": string(b"batch 1 of 1"),
            b"fine_labels": numbers(labels),
            b"coarse_labels": numbers(coarse),
            b"data": array,
        }
    return b"\x80\x02}(" + b"".join(string(key) + value for key, value in items.items()) + b"u."


def tarball_of(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def made_from(files: dict[str, bytes], tarball: bytes) -> Archive:
    described = {name: ArchiveFile(name, md5(content), PER_FILE) for name, content in files.items()}
    return Archive(
        name="fake",
        class_names=tuple("abcdefghij"),
        folder="fake-batches",
        train=(described["batch_1"], described["batch_2"]),
        test=(described["test"],),
        others=(replace(described["meta"], images=0),),
        label_key=b"labels",
        tarball="fake.tar.gz",
        tarball_md5=md5(tarball),
        urls=("http://127.0.0.1:1/default.tar.gz",),  # refuses
        urls_variable="FAKE_URLS",
    )


RANDOM = np.random.default_rng(0)
PIXELS = {name: RANDOM.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8) for name in ("batch_1", "batch_2", "test")}
LABELS = {name: RANDOM.integers(0, 10, PER_FILE).tolist() for name in PIXELS}
FILES = {name: python2_pickle(PIXELS[name], LABELS[name]) for name in PIXELS} | {"meta": b"not read"}
TARBALL = tarball_of({f"fake-batches/{name}": content for name, content in FILES.items()})
FAKE = made_from(FILES, TARBALL)


def put_folder(data_dir: Path) -> Path:
    folder = data_dir / "fake-batches"
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


UNPACKED = {f"fake-batches/{name}": content for name, content in FILES.items()}


def check(dataset: Dataset) -> None:
    for part, batches in ((dataset.train, ["batch_1", "batch_2"]), (dataset.test, ["test"])):
        pixels = np.concatenate([PIXELS[name] for name in batches]).reshape(-1, 3, 32, 32)
        assert np.array_equal(part.images.numpy(), pixels)
        assert part.labels.tolist() == [label for name in batches for label in LABELS[name]]
    assert (dataset.name, dataset.class_names) == ("fake", tuple("abcdefghij"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for archive in (FAKE, CIFAR10, CIFAR100):
        monkeypatch.setenv(archive.urls_variable, "")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "_TIMEOUT_S", 1.0)


def refused(data_dir: Path, archive: Archive = FAKE) -> str:
    """Load, and check that the refusal is one line and that nothing on disk was changed by it."""
    before = tree(data_dir) if data_dir.exists() else None
    with pytest.raises(UserError) as caught:
        load_archive(archive, data_dir)
    assert (tree(data_dir) if data_dir.exists() else None) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The folder


def test_whole_folder_is_read_in_order_without_the_network(tmp_path: Path) -> None:
    put_folder(tmp_path)
    check(load_archive(FAKE, tmp_path))
    assert tree(tmp_path) == UNPACKED


def test_the_layout_of_the_fake_is_that_of_the_official_files() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy.core, which the loader must not touch
        batch = pickle.loads(FILES["test"], encoding="bytes")
    assert np.array_equal(batch[b"data"], PIXELS["test"])
    assert batch[b"labels"] == LABELS["test"]


def test_a_whole_folder_needs_no_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_folder(tmp_path)
    monkeypatch.setattr(os, "open", read_only)
    check(load_archive(FAKE, tmp_path))


@pytest.mark.parametrize("name", ["batch_1", "batch_2", "test"])
@pytest.mark.parametrize("damage", ["truncated", "tampered", "empty"])
def test_damaged_file_is_named_and_left_alone(tmp_path: Path, name: str, damage: str) -> None:
    path = put_folder(tmp_path) / name
    good = path.read_bytes()
    path.write_bytes({"truncated": good[:-1], "tampered": good[:500] + b"!" + good[501:], "empty": b""}[damage])
    assert f"wrong md5, so damaged or not official: {path} (left alone;" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"damaged", b""])
def test_damaged_file_without_images_is_named_beside_good_ones(tmp_path: Path, content: bytes) -> None:
    path = put_folder(tmp_path) / "meta"
    path.write_bytes(content)
    assert f"wrong md5, so damaged or not official: {path} (left alone;" in refused(tmp_path)


def test_file_without_images_need_not_be_there(tmp_path: Path) -> None:
    (put_folder(tmp_path) / "meta").unlink()
    check(load_archive(FAKE, tmp_path))
    assert "fake-batches/meta" not in tree(tmp_path)


def test_damaged_file_is_left_alone_with_a_good_tarball_beside_it(tmp_path: Path) -> None:
    path = put_folder(tmp_path) / "test"
    path.write_bytes(b"damaged")
    (tmp_path / "fake.tar.gz").write_bytes(TARBALL)
    assert str(path) in refused(tmp_path)


def test_damaged_files_are_all_named_before_missing_ones_are_fetched(tmp_path: Path) -> None:
    folder = put_folder(tmp_path)
    (folder / "batch_1").unlink()
    (folder / "test").write_bytes(b"damaged")
    (folder / "meta").write_bytes(b"damaged")
    (tmp_path / "fake.tar.gz").write_bytes(TARBALL)
    assert f"{folder / 'test'}, {folder / 'meta'} (left alone" in refused(tmp_path)


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = put_folder(tmp_path)
    (folder / "test").unlink()
    (folder / "test").mkdir()
    assert refused(tmp_path) == f"cannot read {folder / 'test'}: Is a directory"
    (folder / "batch_1").unlink()
    assert refused(tmp_path) == f"cannot read {folder / 'test'}: Is a directory"


def test_broken_link_is_not_written_over(tmp_path: Path) -> None:
    folder = put_folder(tmp_path)
    (folder / "test").unlink()
    (folder / "test").symlink_to("nowhere")
    (tmp_path / "fake.tar.gz").write_bytes(TARBALL)
    assert refused(tmp_path) == f"cannot read {folder / 'test'}: No such file or directory"


def test_missing_files_are_named_with_the_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put_folder(tmp_path)
    (folder / "batch_2").unlink()
    (folder / "test").unlink()
    monkeypatch.chdir(tmp_path)  # a relative folder is shown as the absolute one it is
    text = refused(Path())
    assert text.startswith(f"missing in {folder}: batch_2, test; the download failed (there is no address to ask); ")
    for way in (f"put fake.tar.gz or the folder fake-batches into {tmp_path},", "--data-dir DIR", "FAKE_URLS"):
        assert way in text
    assert "--dataset shapes" in text


def test_missing_files_come_from_the_tarball_and_good_ones_stay(tmp_path: Path) -> None:
    folder = put_folder(tmp_path)
    (folder / "batch_2").unlink()
    (tmp_path / "fake.tar.gz").write_bytes(TARBALL)
    before = (folder / "batch_1").stat()
    check(load_archive(FAKE, tmp_path))
    after = (folder / "batch_1").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert tree(tmp_path) == UNPACKED | {"fake.tar.gz": TARBALL}


# The pickles


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def with_test_file(data_dir: Path, content: bytes) -> Archive:
    """Put a folder whose last file has this content, described as if it were the right one."""
    put_folder(data_dir).joinpath("test").write_bytes(content)
    return made_from(FILES | {"test": content}, TARBALL)


def test_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    content = pickle.dumps(Payload(mark), protocol=2)
    archive = with_test_file(tmp_path / "data", content)
    text = refused(tmp_path / "data", archive)
    assert not mark.exists()
    assert text.startswith(f"{tmp_path / 'data/fake-batches/test'} would run code (")
    assert "mkdir" in text
    pickle.loads(content)  # the payload works where nothing keeps it from working
    assert mark.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins eval", "numpy load", "numpy.core.multiarray scalar", "numpy.testing ndarray", "numpy ndarray.dump"],
)
def test_only_the_three_names_of_an_array_are_known(tmp_path: Path, name: str) -> None:
    content = b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n."
    assert f"would run code ({name.replace(' ', '.')})" in refused(tmp_path, with_test_file(tmp_path, content))


# The tarball


def test_tarball_placed_by_hand_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "fake.tar.gz").write_bytes(TARBALL)
    check(load_archive(FAKE, tmp_path))
    assert tree(tmp_path) == UNPACKED | {"fake.tar.gz": TARBALL}


@pytest.mark.parametrize("content", [TARBALL[:-1], b"", TARBALL + b"more"])
def test_wrong_tarball_is_named_and_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "fake.tar.gz").write_bytes(content)
    assert f"not official: {tmp_path / 'fake.tar.gz'} (left alone" in refused(tmp_path)


def test_tarball_gives_nothing_but_the_named_regular_files(tmp_path: Path) -> None:
    members = {f"fake-batches/{name}": content for name, content in FILES.items()}
    evil = {
        "../escaped": b"",
        "fake-batches/../../escaped": b"",
        f"{tmp_path}/escaped": b"",
        "fake-batches/more": b"",
        "fake-batches/../test": b"",
        "test": b"",
    }
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        link = tarfile.TarInfo("fake-batches/batch_1")  # the first of that name, so that it is not merely too late
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
        for name, content in (evil | members).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    data_dir = tmp_path / "a/b"
    data_dir.mkdir(parents=True)
    (data_dir / "fake.tar.gz").write_bytes(stream.getvalue())
    check(load_archive(replace(FAKE, tarball_md5=md5(stream.getvalue())), data_dir))
    assert set(tree(tmp_path)) == {f"a/b/{name}" for name in (*members, "fake.tar.gz")}


def test_file_gets_its_name_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake.tar.gz").write_bytes(TARBALL)
    (tmp_path / "fake-batches").mkdir()
    (tmp_path / "fake-batches/batch_1.part").write_bytes(b"left by a killed process")
    renamed = []
    rename = Path.replace

    def spy(self: Path, target: Path) -> Path:
        assert not target.exists()
        assert self.parent == target.parent
        assert self.read_bytes() == FILES[target.name]
        renamed.append(target.name)
        if len(renamed) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", spy)
    with pytest.raises(KeyboardInterrupt):
        load_archive(FAKE, tmp_path)
    assert tree(tmp_path) == {"fake.tar.gz": TARBALL, "fake-batches/batch_1": FILES["batch_1"]}
    check(load_archive(FAKE, tmp_path))  # and goes on from there


# The network


class Server(ThreadingHTTPServer):
    """Serves a folder, counts requests, and holds them while `open` is not set."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.asked = 0
        self.open = threading.Event()
        self.open.set()

    @property
    def urls(self) -> str:
        """Written by hand, with what people put between addresses; the first one refuses."""
        return f" http://127.0.0.1:1/x,\n http://127.0.0.1:{self.server_port}/fake.tar.gz , "


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked += 1
        self.server.open.wait(10)
        super().do_GET()


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "fake.tar.gz").write_bytes(TARBALL)
    with Server(folder) as server:
        monkeypatch.setenv("FAKE_URLS", server.urls)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.open.set()
        server.shutdown()
        thread.join()


def test_download_makes_the_folder_and_unpacks(tmp_path: Path, server: Server) -> None:
    told: list[tuple[int, int | None]] = []
    data_dir = tmp_path / "new/data"
    progress = lambda done, total: told.append((done, total))  # noqa: E731
    check(load_archive(FAKE, data_dir, progress=progress))
    assert told[-1] == (len(TARBALL), len(TARBALL))
    assert tree(data_dir) == UNPACKED | {"fake.tar.gz": TARBALL}
    check(load_archive(FAKE, data_dir))
    assert server.asked == 1


def test_download_completes_a_folder(tmp_path: Path, server: Server) -> None:
    (put_folder(tmp_path) / "test").unlink()
    check(load_archive(FAKE, tmp_path))
    assert server.asked == 1


def test_no_network_leaves_nothing_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAKE_URLS")
    text = refused(tmp_path / "new/data")
    assert "the download failed (127.0.0.1:1: Connection refused);" in text  # from the default address
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("FAKE_URLS", "http://127.0.0.1:1/fake.tar.gz")
    assert refused(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_scheme_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_URLS", "ftp://host/x")
    assert "ftp://host/x" in refused(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def read_only(*args: object, **kwargs: object) -> int:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_unwritable_folder_is_one_line(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", read_only)
    assert refused(tmp_path).startswith(f"cannot write {tmp_path}: Read-only file system; ")
    assert server.asked == 0


def test_disk_that_fills_while_unpacking_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "fake.tar.gz").write_bytes(TARBALL)
    monkeypatch.setattr(Path, "replace", full)
    assert refused(tmp_path).startswith(f"cannot write {tmp_path / 'fake-batches'}: No space left on device; ")


def test_two_at_a_time_download_once(tmp_path: Path, server: Server) -> None:
    # Threads stand for processes: each opens the lock file for itself, which is what the lock goes by.
    server.open.clear()
    results: list[Dataset] = []

    def load() -> None:
        results.append(load_archive(FAKE, tmp_path / "new"))

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    threads[0].join(0.5)
    assert server.asked == 1
    assert not results
    server.open.set()
    for thread in threads:
        thread.join()
    assert server.asked == 1
    for dataset in results:
        check(dataset)
    assert len(results) == 2
    assert tree(tmp_path / "new") == UNPACKED | {"fake.tar.gz": TARBALL}


# CIFAR-10 and CIFAR-100 themselves


@pytest.mark.parametrize(("archive", "num_files", "num_classes"), [(CIFAR10, 7, 10), (CIFAR100, 3, 100)])
def test_archive_is_described_in_full(archive: Archive, num_files: int, num_classes: int) -> None:
    md5s = [archive.tarball_md5, *(file.md5 for file in archive.files)]
    assert all(re.fullmatch("[0-9a-f]{32}", value) for value in md5s)
    assert len(set(md5s)) == len(md5s) == num_files + 1
    assert [sum(file.images for file in part) for part in (archive.train, archive.test)] == [50_000, 10_000]
    assert len(archive.class_names) == num_classes
    assert archive.class_names == tuple(sorted(set(archive.class_names)))  # officially, both are in that order
    assert all(url.startswith("https://") and url.endswith(f"/{archive.tarball}") for url in archive.urls)


def test_archives_are_described_as_in_torchvision() -> None:
    from torchvision.datasets import CIFAR10 as Reference10
    from torchvision.datasets import CIFAR100 as Reference100

    for archive, reference in ((CIFAR10, Reference10), (CIFAR100, Reference100)):
        assert (archive.folder, archive.tarball) == (reference.base_folder, reference.filename)
        assert (archive.tarball_md5, archive.urls[-1]) == (reference.tgz_md5, reference.url)
        assert [[file.name, file.md5] for file in archive.train] == reference.train_list
        assert [[file.name, file.md5] for file in archive.test] == reference.test_list
        assert [(file.name, file.md5) for file in archive.others] == [
            (reference.meta["filename"], reference.meta["md5"])
        ]


def test_cifar100_is_read_with_its_fine_labels(tmp_path: Path) -> None:
    coarse, labels, pixels = [7] * PER_FILE, list(range(80, 100)), PIXELS["batch_1"]
    content = python2_pickle(pixels, labels, coarse)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy.core
        layout = pickle.loads(content, encoding="latin1")
    assert set(layout) == {"filenames", "batch_label", "fine_labels", "coarse_labels", "data"}
    assert layout["coarse_labels"] == coarse

    files = {"train": content, "test": python2_pickle(PIXELS["test"], [0, 99] * 10, coarse), "meta": b"not read"}
    tarball = tarball_of({f"cifar-100-python/{name}": content for name, content in files.items()})
    fake = replace(
        CIFAR100,
        train=(ArchiveFile("train", md5(files["train"]), PER_FILE),),
        test=(ArchiveFile("test", md5(files["test"]), PER_FILE),),
        others=(ArchiveFile("meta", md5(files["meta"])),),
        tarball_md5=md5(tarball),
    )
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(tarball)
    dataset = load_archive(fake, tmp_path)
    assert (dataset.name, dataset.num_classes) == ("cifar100", 100)
    assert [dataset.class_names[label] for label in dataset.test.labels[:2].tolist()] == ["apple", "worm"]
    assert dataset.train.labels.tolist() == labels
    assert np.array_equal(dataset.train.images.numpy(), pixels.reshape(-1, 3, 32, 32))
    assert np.array_equal(dataset.test.images.numpy(), PIXELS["test"].reshape(-1, 3, 32, 32))


def test_missing_files_of_either_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r": train, test; .*cifar-100-python\.tar\.gz .*CIFAR_DIST_CIFAR100_URLS"):
        load_archive(CIFAR100, tmp_path)
    with pytest.raises(UserError, match=r"data_batch_1, .*cifar-10-python\.tar\.gz .*CIFAR_DIST_CIFAR10_URLS"):
        load_archive(CIFAR10, tmp_path)


@pytest.mark.official
def test_official_files_are_read_as_torchvision_reads_them() -> None:
    root = os.environ.get("CIFAR_DIST_TEST_DATA")
    if not root:
        pytest.skip("CIFAR_DIST_TEST_DATA names no folder that holds cifar-10-batches-py")
    dataset = load_archive(CIFAR10, Path(root))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision unpickles through numpy.core
        from torchvision.datasets import CIFAR10 as Reference

        for part, train in ((dataset.train, True), (dataset.test, False)):
            reference = Reference(root, train=train, download=False)
            assert torch.equal(part.images, torch.from_numpy(reference.data).permute(0, 3, 1, 2))
            assert part.labels.tolist() == reference.targets
            assert list(dataset.class_names) == reference.classes
    assert part.images.is_contiguous()
