"""Ctrl-Z stops the launcher and its processes, and `fg` continues all."""

import contextlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

SCRIPT = """
import sys
from cifar_dist.runtime.launch import _Processes
with _Processes() as processes:
    for _ in range(2):
        processes.start([sys.executable, "-c", "import sys; print('runs', flush=True); sys.stdin.read()"], {}, [])
    print("runs", flush=True)
    sys.exit(processes.wait())
"""


def wait_for(processes: list[psutil.Process], *, stopped: bool) -> None:
    for _ in range(1000):
        if all((process.status() == psutil.STATUS_STOPPED) == stopped for process in processes):
            return
        time.sleep(0.01)
    raise AssertionError([process.status() for process in processes])


@pytest.mark.skipif(not hasattr(signal, "SIGTSTP"), reason="needs job control")
def test_ctrl_z_stops_all_processes_and_fg_continues_them():
    launcher = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert [launcher.stdout.readline() for _ in range(3)] == [b"runs\n"] * 3
    processes = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children()]
    assert len(processes) == 3
    try:
        for _ in range(2):
            launcher.send_signal(signal.SIGTSTP)
            wait_for(processes, stopped=True)
            launcher.send_signal(signal.SIGCONT)
            wait_for(processes, stopped=False)
        launcher.communicate(timeout=60)
        assert launcher.returncode == 0
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
