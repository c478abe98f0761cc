"""Two processes in the surroundings of laptops, containers and clusters: names, temporary folders, files, peers."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from tests.conftest import ROOT, make_images
from tests.launching.test_launch import begin, finish, wait_for

LAUNCH = str(ROOT / "launch.py")
ARGUMENTS = (
    "--recipe", "original", "--dataset", "images", "--precision", "no", "--epochs", "100000", "--run-dir", "run",
    "--set", "global_batch_size=8", "stem=small", "image_size=16", "early_stopping.enabled=false",
    "optimizer.learning_rate=0.001",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    make_images(tmp_path / "images")
    return tmp_path


def without_host_name() -> list[str]:
    """A command that runs another where the host's name does not resolve; nothing where that is not allowed."""
    command = ["unshare", "--user", "--map-root-user", "--uts", "sh", "-c", 'hostname ghost.invalid; exec "$@"', "sh"]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return command


def test_two_processes_train_whatever_surrounds_them(folder):
    """A host name that does not resolve, files named as Python's modules, and a temporary folder that is emptied."""
    for name in ("queue.py", "token.py", "torch.py"):
        (folder / name).write_text("raise SystemExit('the file in the current folder was imported')\n")
    temporary = folder / "temporary"
    temporary.mkdir()
    launcher = (*without_host_name(), sys.executable, LAUNCH, "--num-processes", "2")
    process = begin(*launcher, *ARGUMENTS, cwd=folder, TMPDIR=str(temporary))
    metrics = folder / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process)
    for path in temporary.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    process.send_signal(signal.SIGTERM)
    ((code, out, err),) = finish(process)
    assert code == 75, err
    (line,) = err.splitlines()
    assert line.startswith("interrupted in epoch ") and "and saved" in line
    assert "4 per device x 2 processes" in out
    assert json.loads((folder / "run" / "summary.json").read_text())["status"] == "interrupted"


def test_peers_that_do_not_come_are_named_and_signals_act(folder):
    """The first of two machines waits; a second one with its rank is refused; then both ways of waiting are ended."""
    port = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    (folder / "machine.yaml").write_text(
        "distributed_type: MULTI_GPU\nuse_cpu: true\nnum_machines: 2\nnum_processes: 2\nmachine_rank: 0\n"
        f"main_process_ip: 127.0.0.1\nmain_process_port: {port}\n"
    )
    first = begin(sys.executable, LAUNCH, "--config", "machine.yaml", *ARGUMENTS, cwd=folder)
    other = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    alone = begin(sys.executable, LAUNCH, *ARGUMENTS, cwd=folder, **other, MASTER_PORT="1")
    assert first.stderr.readline() == f"waiting for 1 of 2 processes at 127.0.0.1:{port}\n"
    assert alone.stderr.readline() == "waiting for rank 0 at 127.0.0.1:1 ([Errno 111] Connection refused)\n"
    second = begin(sys.executable, LAUNCH, "--config", "machine.yaml", *ARGUMENTS, cwd=folder)
    ((code, _, err),) = finish(second)
    assert code == 2
    assert err.startswith(f"error: port {port} of {os.uname().nodename} is in use: set MASTER_PORT")
    first.send_signal(signal.SIGINT)
    alone.send_signal(signal.SIGTERM)
    (code, _, err), (code_alone, _, err_alone) = finish(first, alone)
    assert (code, err) == (130, "interrupted, with nothing left to save\n")
    assert (code_alone, err_alone) == (75, "")
    assert not (folder / "run").exists()
