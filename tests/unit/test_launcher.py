"""How the launcher starts the processes of a machine, passes signals on, and what it returns."""

import dataclasses
import os
import signal
import sys
from types import SimpleNamespace

import psutil
import pytest

from cifar_dist.config.accelerate_config import AccelerateConfig, load_accelerate_config
from cifar_dist.runtime import launch as launcher
from cifar_dist.runtime.launch import _Processes, child_environment, launch

CONFIG = AccelerateConfig(path="x.yaml", num_processes=2)
NODES = AccelerateConfig(num_processes=4, num_machines=2, machine_rank=1, main_process_ip="10.0.0.1")


@pytest.fixture
def started(monkeypatch):
    """What would be started: a list of (environment, descriptors)."""
    processes = []
    monkeypatch.setattr(_Processes, "start", lambda _, command, environ, pipes: processes.append((environ, pipes)))
    monkeypatch.setattr(_Processes, "wait", lambda _: 0)
    return processes


@pytest.mark.parametrize(
    ("config", "count", "ranks", "address"),
    [
        (CONFIG, 2, ["0 0", "1 1"], "127.0.0.1"),  # the host's own name may not resolve
        (NODES, 4, ["2 0", "3 1"], "10.0.0.1:29500"),
        (dataclasses.replace(NODES, machine_rank=0, main_process_port=1234), 4, ["0 0", "1 1"], "10.0.0.1:1234"),
    ],
)
def test_a_machine_starts_its_share(started, config, count, ranks, address):
    assert launch([], config, count) == 0
    assert [f"{environ['RANK']} {environ['LOCAL_RANK']}" for environ, _ in started] == ranks
    for environ, descriptors in started:
        assert (environ["WORLD_SIZE"], environ["LOCAL_WORLD_SIZE"]) == (str(count), "2")
        assert f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}".startswith(address)
        holds_socket = config is CONFIG and environ["RANK"] == "0"
        assert ("CIFAR_DIST_LISTENING_SOCKET" in environ, len(descriptors)) == (holds_socket, int(holds_socket))


def test_an_outer_launchers_words_do_not_leak():
    outer = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True", "PET_NNODES": "2"}
    slurm = {"SLURM_CPUS_PER_TASK": "8"}  # of one task, which all share
    environ = {**outer, **slurm, "HOME": "/h", "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}
    child = child_environment(environ, CONFIG, 2)
    foreign = ("ACCELERATE_", "PET_", "TORCHELASTIC_", "OMP_", "SLURM_")
    assert not [name for name in child if name.startswith(foreign)]
    assert child["HOME"] == "/h"


def test_what_somebody_wished_is_handed_down():
    child = child_environment({"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}, CONFIG, 2)
    assert (child["OMP_NUM_THREADS"], child["ACCELERATE_USE_CPU"]) == ("1", "true")
    child = child_environment({"ACCELERATE_MIXED_PRECISION": "bf16", "OMP_NUM_THREADS": "3"}, CONFIG, 2)
    assert (child["OMP_NUM_THREADS"], child["ACCELERATE_MIXED_PRECISION"]) == ("3", "bf16")
    compiled = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "max-autotune"}
    assert compiled.items() <= child_environment(compiled, load_accelerate_config(None, compiled), 2).items()
    config = AccelerateConfig(path="x.yaml", use_cpu=True, mixed_precision="fp16")
    child = child_environment({"PYTHONPATH": "/mine", "GLOO_SOCKET_IFNAME": "eth7"}, config, 2)
    assert (child["ACCELERATE_USE_CPU"], child["ACCELERATE_MIXED_PRECISION"]) == ("true", "fp16")
    assert (child["PYTHONPATH"], child["GLOO_SOCKET_IFNAME"]) == ("/mine", "eth7")


def run(*scripts: str) -> int:
    """Run shell scripts as the processes of a machine."""
    with _Processes() as processes:
        for script in scripts:
            processes.start(["sh", "-c", script], os.environ, [])
        return processes.wait()


@pytest.mark.parametrize(
    ("scripts", "code", "line"),
    [
        (("exit 0", "exit 0"), 0, ""),
        (("exit 75", "exit 75"), 75, ""),
        (("exit 0", "exit 1"), 0, ""),  # the first has written that the run is complete
        (("exec sleep 60", "exit 2"), 2, ""),  # it waits for who is gone, and is killed
        (("sleep 0.2; exit 1", "kill -KILL $$"), 1, "process 1 of this machine was killed by SIGKILL; out of memory?"),
        (("kill -SEGV $$", "exec sleep 60"), 1, "process 0 of this machine was killed by SIGSEGV"),
    ],
)
def test_the_code_is_the_first_process_s(scripts, code, line, monkeypatch, capfd):
    monkeypatch.setattr(launcher, "_GRACE_SECONDS", 0.3)
    assert run(*scripts) == code
    assert capfd.readouterr().err.splitlines() == ([line] if line else [])


def test_a_killed_process_is_named_before_those_that_ended_because_of_it(capsys):
    processes = _Processes()
    processes._started = [SimpleNamespace(returncode=1), SimpleNamespace(returncode=-signal.SIGKILL)]
    assert processes._first_failed() is processes._started[1]
    assert capsys.readouterr().err.startswith("process 1 of this machine was killed by SIGKILL")


def test_processes_that_are_all_killed_at_once_are_named(capfd, monkeypatch):
    monkeypatch.setattr(_Processes, "start", lambda self, process: self._started.append(process))
    with _Processes() as processes:
        for _ in range(2):
            processes.start(SimpleNamespace(returncode=-signal.SIGKILL, poll=lambda: -signal.SIGKILL))
        assert processes.wait() == 1
    assert capfd.readouterr().err.startswith("process 0 of this machine was killed by SIGKILL")


# As a process of ours: signals are blocked until it has handlers, which takes rank 0 a while. Rank 1 signals its
# launcher meanwhile, and after each Ctrl-C.
PROCESS = """
import os, signal, sys, time
def signal_launcher(number, frame=None):
    os.kill(int(sys.argv[1]), number)
if sys.argv[3] == "1":
    signal_launcher(getattr(signal, sys.argv[2]))
time.sleep(0.5)
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
signal.signal(signal.SIGINT, signal_launcher)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
time.sleep(60)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGQUIT", 130), ("SIGINT", 130)])
def test_signals_reach_processes_that_have_hardly_begun(name, code):
    """Also one that comes while others are still started. A second Ctrl-C, and SIGQUIT, kill all."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    try:
        with _Processes() as processes:
            for rank in "01":
                processes.start([sys.executable, "-c", PROCESS, str(os.getpid()), name, rank], os.environ, [])
                if rank == "0" and name == "SIGTERM":
                    os.kill(os.getpid(), signal.SIGTERM)
            assert processes.wait() == code
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_z_stops_the_processes_too(monkeypatch):
    seen = []

    def stop(number):
        """Be stopped, until the process is, too."""
        while child.status() != psutil.STATUS_STOPPED:
            assert child.is_running()
        seen.append(number)

    with _Processes() as processes:
        processes.start(["sleep", "60"], os.environ, [])
        child = psutil.Process(processes._started[0].pid)
        monkeypatch.setattr(signal, "raise_signal", stop)
        processes._suspend(signal.SIGTSTP, None)
        assert seen == [signal.SIGSTOP]
        while child.status() == psutil.STATUS_STOPPED:
            assert child.is_running()
        child.kill()  # it blocks other signals, as none of ours does for long
        assert processes.wait() == 1
