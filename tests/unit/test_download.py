"""The download against a real server on this machine that breaks off, lies, refuses, keeps silent or serves well."""

import errno
import hashlib
import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cifar_dist.config.errors import UserError
from cifar_dist.data import download as download_module
from cifar_dist.data.download import DownloadError, download, exclusive, reason_of

GOOD = bytes(range(256)) * 4096  # 1 MiB, several chunks
MD5 = hashlib.md5(GOOD).hexdigest()
HALF = len(GOOD) // 2


class Server(ThreadingHTTPServer):
    """Serves GOOD at /good; other paths name what goes wrong. Remembers (path, Range header) of each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str | None]] = []
        self.closing = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that hangs up is part of the tests


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append((self.path, wanted))
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        getattr(self, "serve_" + self.path.strip("/"))(start)

    def send(self, start: int, content: bytes = GOOD, end: int | None = None, shift: int = 0) -> None:
        """Send content from `start` on (as 206 if that is not 0), and hang up at `end`."""
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start + shift}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[start:end])

    def serve_good(self, start: int) -> None:
        self.send(start)

    def serve_breaks(self, start: int) -> None:
        """Gives the first half, then the rest to who asks for it."""
        self.send(start, end=None if start else HALF)

    def serve_stutters(self, start: int) -> None:
        """Gives an eighth of the whole to each request."""
        self.send(start, end=start + len(GOOD) // 8)

    def serve_breaks_and_forgets(self, start: int) -> None:
        """Breaks off at the first request and knows no Range."""
        self.send(0, end=HALF if len(self.server.asked) == 1 else None)

    def serve_stuck(self, start: int) -> None:
        """Knows no Range and breaks off at the same place each time."""
        self.send(0, end=HALF)

    def serve_shifted(self, start: int) -> None:
        """Gives another range than it was asked for."""
        self.send(start, end=None if start else HALF, shift=1)

    def serve_lies(self, start: int) -> None:
        self.send(start, content=GOOD[::-1])

    def serve_half_lies(self, start: int) -> None:
        """Gives a wrong first half, and breaks off for good."""
        self.send(start, content=GOOD[::-1], end=min(HALF, start) or HALF)

    def serve_missing(self, start: int) -> None:
        self.send_error(404)

    def serve_silent(self, start: int) -> None:
        self.server.closing.wait(20)

    def serve_stalls(self, start: int) -> None:
        """Gives half to the first request and then keeps the connection open without a byte; resumes well."""
        self.send(start, end=None if start else HALF)
        if not start:
            self.server.closing.wait(20)

    def serve_empty(self, start: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def serve_unsized(self, start: int) -> None:
        """Gives no length: the end of the connection is the end of the file."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(GOOD)

    def serve_moved(self, start: int) -> None:
        self.send_response(302)
        self.send_header("Location", "/good")
        self.end_headers()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "file"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def download_within(timeout: float, server: Server, target: Path, *paths: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download_module, "_TIMEOUT_S", timeout)
        patch.setattr(download_module, "_PAUSE_S", min(1.0, timeout))
        download([server.url(path) for path in paths], target, MD5)


def fetch(server: Server, target: Path, *paths: str, timeout: float = 5.0) -> list[tuple[str, str | None]]:
    """Download, check what came, and give what the server was asked for."""
    download_within(timeout, server, target, *paths)
    assert target.read_bytes() == GOOD
    assert names(target.parent) == ["file"]
    return server.asked


def fail(server: Server, target: Path, *paths: str, timeout: float = 5.0) -> str:
    with pytest.raises(DownloadError) as caught:
        download_within(timeout, server, target, *paths)
    assert not target.exists()
    return str(caught.value).replace(f"127.0.0.1:{server.server_port}", "HOST")


def part_of(target: Path) -> Path:
    return target.with_name("file.part")


def test_good_server_is_asked_once_and_progress_is_told(server: Server, target: Path) -> None:
    told: list[tuple[int, int | None]] = []
    download([server.url("/good")], target, MD5, progress=lambda done, total: told.append((done, total)))
    assert target.read_bytes() == GOOD
    assert server.asked == [("/good", None)]
    assert told == sorted(told)
    assert told[-1] == (len(GOOD), len(GOOD))


def test_broken_connection_is_resumed_with_the_right_range(server: Server, target: Path) -> None:
    assert fetch(server, target, "/breaks") == [("/breaks", None), ("/breaks", f"bytes={HALF}-")]


def test_an_address_may_go_on_as_long_as_it_brings_bytes(server: Server, target: Path) -> None:
    assert len(fetch(server, target, "/stutters")) == 8


def test_server_without_range_is_read_from_the_start(server: Server, target: Path) -> None:
    asked = fetch(server, target, "/breaks_and_forgets")
    assert asked == [("/breaks_and_forgets", None), ("/breaks_and_forgets", f"bytes={HALF}-")]


def test_server_that_never_gets_further_is_given_up(server: Server, target: Path) -> None:
    text = fail(server, target, "/stuck", timeout=0.1)
    assert text == f"HOST: broke off after {HALF} of {len(GOOD)} bytes"
    assert len(server.asked) == 3  # one that brought bytes, two that brought no new ones
    assert part_of(target).read_bytes() == GOOD[:HALF]


def test_server_that_falls_behind_the_part_file_is_given_up(server: Server, target: Path) -> None:
    part_of(target).write_bytes(GOOD[: HALF + 1000])
    fail(server, target, "/stuck", timeout=0.1)
    assert len(server.asked) == 2


def test_wrong_range_is_not_appended(server: Server, target: Path) -> None:
    assert "another range" in fail(server, target, "/shifted")
    assert part_of(target).read_bytes() == GOOD[:HALF]


def test_next_start_goes_on_from_the_part_file(server: Server, target: Path) -> None:
    part_of(target).write_bytes(GOOD[:1000])
    assert fetch(server, target, "/good") == [("/good", "bytes=1000-")]


def test_next_address_goes_on_from_the_part_file(server: Server, target: Path) -> None:
    assert fetch(server, target, "/stuck", "/good", timeout=0.1)[-1] == ("/good", f"bytes={HALF}-")


def test_whole_part_file_is_taken_after_416(server: Server, target: Path) -> None:
    part_of(target).write_bytes(GOOD)
    assert fetch(server, target, "/good") == [("/good", f"bytes={len(GOOD)}-")]


@pytest.mark.parametrize("rest", [b"wrong", GOOD + b"too long"])
def test_wrong_part_file_of_an_earlier_run_costs_one_more_request(server: Server, target: Path, rest: bytes) -> None:
    part_of(target).write_bytes(rest)
    assert fetch(server, target, "/good") == [("/good", f"bytes={len(rest)}-"), ("/good", None)]


def test_lying_address_loses_its_part_and_the_next_starts_from_zero(server: Server, target: Path) -> None:
    assert fetch(server, target, "/lies", "/good") == [("/lies", None), ("/good", None)]


def test_good_address_is_not_blamed_for_the_lie_of_another(server: Server, target: Path) -> None:
    asked = fetch(server, target, "/half_lies", "/good", timeout=0.1)
    assert asked[-2:] == [("/good", f"bytes={HALF}-"), ("/good", None)]


def test_nothing_is_left_of_a_lie(server: Server, target: Path) -> None:
    assert fail(server, target, "/lies") == "HOST: wrong content (its md5 differs)"
    assert names(target.parent) == []


def test_404_is_asked_once_and_leaves_nothing(server: Server, target: Path) -> None:
    assert fail(server, target, "/missing") == "HOST: HTTP status 404"
    assert server.asked == [("/missing", None)]
    assert names(target.parent) == []


def test_404_goes_to_the_next_address_with_the_part_kept(server: Server, target: Path) -> None:
    part_of(target).write_bytes(GOOD[:1000])
    assert fetch(server, target, "/missing", "/good")[-1] == ("/good", "bytes=1000-")


def test_refused_connection_goes_to_the_next_address_at_once(server: Server, target: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, so nobody else takes it, and not listening, so it refuses
        refusing = f"http://127.0.0.1:{unused.getsockname()[1]}/good"
        start = time.monotonic()
        download([refusing, server.url("/good")], target, MD5)
    assert time.monotonic() - start < 0.9  # a pause before a second attempt would take a second
    assert target.read_bytes() == GOOD


def test_silent_server_is_given_up_after_two_timeouts(server: Server, target: Path) -> None:
    start = time.monotonic()
    assert fail(server, target, "/silent", timeout=0.2) == "HOST: timed out"
    assert len(server.asked) == 2
    assert time.monotonic() - start < 3
    assert names(target.parent) == []


def test_stalled_connection_is_resumed(server: Server, target: Path) -> None:
    assert fetch(server, target, "/stalls", timeout=0.3)[-1] == ("/stalls", f"bytes={HALF}-")


def test_empty_answer_leaves_nothing_and_keeps_the_part(server: Server, target: Path) -> None:
    assert "broke off after 0" in fail(server, target, "/empty", timeout=0.1)
    assert names(target.parent) == []
    part_of(target).write_bytes(GOOD[:1000])
    fail(server, target, "/empty", timeout=0.1)
    assert part_of(target).read_bytes() == GOOD[:1000]


@pytest.mark.parametrize("path", ["/unsized", "/moved"])
def test_other_good_answers(server: Server, target: Path, path: str) -> None:
    fetch(server, target, path)


def test_every_address_and_its_reason_is_named(server: Server, target: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        download([server.url("/missing"), "http://a..b/", "http://host:port/", server.url("/lies")], target, MD5)
    host = f"127.0.0.1:{server.server_port}"
    for reason in (f"{host}: HTTP status 404; a..b: ", "; host:port: ", f"; {host}: wrong content"):
        assert reason in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://host/file", "file:///etc/passwd", "just-a-name"])
def test_other_schemes_are_refused_before_anything_is_asked(server: Server, target: Path, url: str) -> None:
    with pytest.raises(UserError, match=url):
        download([server.url("/good"), url], target, MD5)
    assert server.asked == []


def test_full_disk_is_one_line_that_names_the_file(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: io.FileIO, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download_module, "_write_all", full)
    with pytest.raises(UserError) as caught:
        download([server.url("/good"), server.url("/good")], target, MD5)
    assert str(caught.value).startswith(f"cannot write {part_of(target)}: No space left on device; ")
    assert len(server.asked) == 1  # the second address would fill it no less


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_really_full_disk(server: Server, target: Path) -> None:
    part_of(target).symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left"):
        download([server.url("/good")], target, MD5)


def test_short_writes_are_completed() -> None:
    class Short(io.BytesIO):
        def write(self, data: bytes) -> int:  # type: ignore[override]
            return super().write(bytes(data[:3]))

    file = Short()
    download_module._write_all(file, b"0123456789")  # type: ignore[arg-type]
    assert file.getvalue() == b"0123456789"


def test_exclusive_removes_what_it_made_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with exclusive(tmp_path / "a/b/c", "lock"):
        assert names(tmp_path / "a/b/c") == ["lock"]
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == []
    with exclusive(tmp_path / "a", "lock"):
        (tmp_path / "a/result").touch()
    assert names(tmp_path / "a") == ["result"]


def test_exclusive_cleans_up_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyError), exclusive(tmp_path / "new", "lock"):
        raise KeyError
    assert names(tmp_path) == []


def test_unwritable_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*args: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(UserError, match=r"cannot write .*/new: Read-only file system; .*--data-dir"):
        exclusive(tmp_path / "new", "lock").__enter__()
    assert names(tmp_path) == []


HOLDER = """
import sys
from pathlib import Path
from cifar_dist.data.download import exclusive
with exclusive(Path(sys.argv[1]), "lock"):
    print("in", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fcntl")
def test_processes_hold_the_folder_one_after_the_other(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    entered: list[subprocess.Popen[str]] = []
    condition = threading.Condition()
    threads: list[threading.Thread] = []

    def watch(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        with condition:
            entered.append(process)
            condition.notify()

    def start() -> None:
        command = [sys.executable, "-c", HOLDER, str(folder)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
        threads.append(threading.Thread(target=watch, args=(process,)))
        threads[-1].start()

    for _ in range(3):
        start()
    for count in range(1, 5):
        with condition:
            assert condition.wait_for(lambda count=count: len(entered) >= count, timeout=20)  # type: ignore[misc]
        if count == 2:
            # The first one has removed the lock file it was waited for on; this one never saw that file.
            start()
        with condition:
            condition.wait(0.8 if count < 3 else 0.1)  # time for another one to come in wrongly
            assert len(entered) == count
        entered[-1].communicate("")
    for thread in threads:
        thread.join()
    assert [process.returncode for process in entered] == [0] * 4
    assert names(tmp_path) == []


def test_reason_of_is_short() -> None:
    assert reason_of(OSError(errno.EROFS, "Read-only file system", "/x")) == "Read-only file system"
    assert reason_of(ValueError()) == "ValueError"
