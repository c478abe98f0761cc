"""Downloads from a server on this machine that breaks off, lies, refuses or stays silent."""

import hashlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cifar_dist.config.errors import UserError
from cifar_dist.data import download as download_module
from cifar_dist.data.download import DownloadError, download

GOOD = bytes(range(256)) * 4096  # 1 MiB, several chunks
MD5 = hashlib.md5(GOOD).hexdigest()
HALF = len(GOOD) // 2


class Server(ThreadingHTTPServer):
    """Record (path, first byte) of each request; the path names what goes wrong."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, int]] = []
        self.closing = threading.Event()

    def urls(self, *paths: str) -> list[str]:
        return [f"http://127.0.0.1:{self.server_port}/{path}" for path in paths]

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that hangs up is part of the tests


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))
        assert match is not None
        path, start = self.path.strip("/"), int(match[1])
        self.server.requests.append((path, start))
        match path:
            case "good":
                self.send(start)
            case "breaks":
                self.send(start, end=None if start else HALF)
            case "stutters":  # an eighth of the file to each request
                self.send(start, end=start + len(GOOD) // 8)
            case "forgets":  # breaks off at the first request, and does not support Range
                self.send(0, end=HALF if len(self.server.requests) == 1 else None)
            case "stuck":  # does not support Range, and always breaks off at the same byte
                self.send(0, end=HALF)
            case "shifted":  # sends another range than requested
                self.send(start, end=None if start else HALF, shift=1)
            case "lies":
                self.send(start, content=GOOD[::-1])
            case "half_lies":  # a wrong first half, then nothing more
                self.send(start, content=GOOD[::-1], end=min(HALF, start) or HALF)
            case "silent":
                self.server.closing.wait(60)
            case "stalls":  # half of the file, then an open connection without a byte; resumes well
                self.send(start, end=None if start else HALF)
                if not start:
                    self.server.closing.wait(60)
            case _:
                self.send_error(404)

    def send(self, start: int, content: bytes = GOOD, end: int | None = None, shift: int = 0) -> None:
        """Send content from `start` on (as 206 if that is not 0), and hang up at `end`."""
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start + shift}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[start:end])


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the pauses between attempts instead of sleeping."""
    monkeypatch.setenv("no_proxy", "*")
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "file"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def part_of(target: Path) -> Path:
    return target.with_name("file.part")


@pytest.mark.parametrize(
    ("paths", "part", "requests"),
    [
        (["breaks"], b"", [("breaks", 0), ("breaks", HALF)]),
        (["stutters"], b"", [("stutters", eighth * len(GOOD) // 8) for eighth in range(8)]),
        (["forgets"], b"", [("forgets", 0), ("forgets", HALF)]),
        # A part file of an earlier start is completed, or found whole by status 416, or replaced.
        (["good"], GOOD[:1000], [("good", 1000)]),
        (["good"], GOOD, [("good", len(GOOD))]),
        (["good"], b"wrong", [("good", 5), ("good", 0)]),
        # The next address continues with good bytes, and does not inherit wrong ones.
        (["stuck", "good"], b"", [("stuck", 0), *2 * [("stuck", HALF)], ("good", HALF)]),
        (["missing", "good"], GOOD[:1000], [("missing", 1000), ("good", 1000)]),
        (["lies", "good"], b"", [("lies", 0), ("good", 0)]),
        (["half_lies", "good"], b"", [("half_lies", 0), *2 * [("half_lies", HALF)], ("good", HALF), ("good", 0)]),
    ],
    ids=[
        *("broken connection", "little at a time", "no Range"),
        *("part file", "whole part file", "wrong part file"),
        *("after a stuck one", "after a missing one", "after a lie", "after half a lie"),
    ],
)
def test_download_resumes_with_the_fewest_bytes(server, target, paths, part, requests):
    if part:
        part_of(target).write_bytes(part)
    download(server.urls(*paths), target, MD5)
    assert target.read_bytes() == GOOD
    assert names(target.parent) == ["file"]
    assert server.requests == requests


@pytest.mark.parametrize(
    ("path", "part", "reason", "part_after", "num_requests"),
    [
        ("stuck", b"", f"broke off after {HALF} of {len(GOOD)} bytes", GOOD[:HALF], 3),  # two bring no new byte
        ("shifted", b"", "sent another range than requested", GOOD[:HALF], 2),
        ("lies", b"", "wrong content (its md5 differs)", b"", 1),
        ("missing", b"", "HTTP status 404", b"", 1),
    ],
    ids=["stuck", "another range", "lie", "missing"],
)
def test_failed_download_keeps_only_useful_bytes(server, target, path, part, reason, part_after, num_requests):
    if part:
        part_of(target).write_bytes(part)
    with pytest.raises(DownloadError) as caught:
        download(server.urls(path), target, MD5)
    assert str(caught.value) == f"127.0.0.1:{server.server_port}: {reason}"
    assert names(target.parent) == (["file.part"] if part_after else [])
    assert not part_after or part_of(target).read_bytes() == part_after
    assert len(server.requests) == num_requests


def test_silent_server_is_given_up_after_two_attempts(server, target, pauses, monkeypatch):
    monkeypatch.setattr(download_module, "_TIMEOUT_SECONDS", 0.1)
    with pytest.raises(DownloadError, match="timed out"):
        download(server.urls("silent"), target, MD5)
    assert pauses == [download_module._PAUSE_SECONDS]


def test_stalled_connection_is_resumed_and_progress_reported(server, target, monkeypatch):
    monkeypatch.setattr(download_module, "_TIMEOUT_SECONDS", 1.0)
    progress: list[tuple[int, int | None]] = []
    download(server.urls("stalls"), target, MD5, progress=lambda done, total: progress.append((done, total)))
    assert server.requests[-1] == ("stalls", HALF)
    assert progress == sorted(progress) and progress[-1] == (len(GOOD), len(GOOD))


def test_refused_connection_goes_to_the_next_address_at_once(server, target, pauses):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # does not listen, so it refuses
        download([f"http://127.0.0.1:{unused.getsockname()[1]}/good", *server.urls("good")], target, MD5)
    assert target.read_bytes() == GOOD
    assert pauses == []


def test_every_address_and_its_reason_is_named(server, target):
    missing, lies = server.urls("missing", "lies")
    with pytest.raises(DownloadError) as caught:
        download([missing, "http://a..b/", "http://host:port/", lies], target, MD5)
    host = f"127.0.0.1:{server.server_port}"
    for reason in (f"{host}: HTTP status 404; a..b: ", "; host:port: ", f"; {host}: wrong content"):
        assert reason in str(caught.value)


def test_other_schemes_are_refused_before_any_request(server, target):
    for url in ("ftp://host/file", "file:///etc/passwd", "just-a-name"):
        with pytest.raises(UserError, match=url):
            download([*server.urls("good"), url], target, MD5)
    assert server.requests == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_one_line_and_ends_the_download(server, target):
    part_of(target).symlink_to("/dev/full")
    with pytest.raises(UserError) as caught:
        download(server.urls("good", "good"), target, MD5)
    assert str(caught.value).startswith(f"cannot write {part_of(target)}: No space left on device; ")
    assert len(server.requests) == 1  # the second address would fill the disk as well
