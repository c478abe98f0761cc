"""Mistakes in the environment of a world are one line; while ranks are awaited, signals act and a line says so."""

import contextlib
import itertools
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from cifar_dist import cli
from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.errors import PeerFailedError, UserError
from cifar_dist.config.world import World, first_host
from cifar_dist.runtime import rendezvous as meeting
from cifar_dist.runtime.distributed import connect, start
from cifar_dist.runtime.rendezvous import rendezvous

TWO = World(rank=0, size=2, local_rank=0, local_size=1, launcher="torchrun")
OTHER = World(rank=1, size=2, local_rank=0, local_size=1, launcher="torchrun")
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n[1-2]"}


@pytest.mark.parametrize(
    ("environ", "size"),
    [
        ({"SLURM_JOB_ID": "7", "OMPI_COMM_WORLD_SIZE": "4"}, None),  # mpirun in an sbatch script
        ({"SLURM_JOB_ID": "7", "PMI_SIZE": "4"}, None),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "2", "OMPI_COMM_WORLD_SIZE": "4"}, None),  # mpirun's daemons are a step
        ({**STEP, "SLURM_STEP_NUM_TASKS": "2", "PMI_SIZE": "4"}, None),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "PMI_SIZE": "4"}, None),  # mpiexec in srun --pty bash
        ({"MV2_COMM_WORLD_SIZE": "2"}, None),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "2", "PMI_SIZE": "2"}, 2),  # srun --mpi=pmi2
        ({"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": ""}, 1),
        (
            {"WORLD_SIZE": "8", "RANK": "0", "LOCAL_WORLD_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "2"},
            8,
        ),  # mpirun starts torchrun
    ],
)
def test_ranks_of_mpirun_are_refused_in_a_slurm_job_too(environ, size):
    if size is None:
        with pytest.raises(UserError, match=r"_SIZE=\d: start the processes with .* not mpirun"):
            World.from_environment(environ)
    else:
        assert World.from_environment(environ).size == size


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("rack[0-1]node[0-3]", "rack0node0"), ("r[01,3]n[7-9]x,b", "r01n7x"), ("a[1-2]b,c[3-4]", "a1b"),
        ("a,b[1]", "a"), ("n[2-3]-[05-06]-ib[1],z", "n2-05-ib1"),
    ],
)  # fmt: skip
def test_the_first_host_of_a_list_with_several_brackets(nodelist, host):
    assert first_host(nodelist) == host


@pytest.fixture
def port(monkeypatch) -> Iterator[int]:
    """A free port that the environment names, and short patience."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(number)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meeting, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(meeting, "_WORLDS", itertools.repeat(0))
    yield number
    for thread in threading.enumerate():
        if thread.name == "rendezvous":
            thread.join(5)
            assert not thread.is_alive(), "it waits on, after this process has given up"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"MASTER_ADDR": ""}, "WORLD_SIZE=2 is set without MASTER_ADDR: set it to the address of rank 0"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT must be a number, not 'x'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT must be from 1 to 65535, not 70000"),
        ({"MASTER_ADDR": "a..b"}, r"cannot reach MASTER_ADDR=a\.\.b \(rank 0\): "),
        ({"GLOO_SOCKET_IFNAME": "lo,nope0"}, "GLOO_SOCKET_IFNAME=lo,nope0: there is no interface 'nope0', set one of "),
    ],
)
def test_a_mistake_in_the_environment_is_one_line(port, environ, message, monkeypatch):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        rendezvous(OTHER, "gloo")


def test_an_unknown_host_name_has_time_to_become_known(port, monkeypatch):
    monkeypatch.setattr(meeting, "FIRST_NOTE_SECONDS", 0.0)
    tried = []

    def resolve(*_, **__):
        tried.append(time.monotonic())
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", resolve)
    with pytest.raises(UserError, match=r"cannot reach MASTER_ADDR=127.0.0.1 \(rank 0\): .*Name or service not known"):
        rendezvous(OTHER, "gloo")
    assert len(tried) > 1 and tried[-1] - tried[0] > 0.4


def test_a_port_in_use_is_named(port):
    with socket.create_server(("", port)), pytest.raises(UserError, match=f"port {port} of .* is in use: set MASTER_P"):
        rendezvous(TWO, "gloo")


def test_another_program_at_the_address_is_not_waited_for(port):
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(UserError, match=f"gave up waiting for an answer of rank 0 at 127.0.0.1:{port}: another program"),
    ):
        rendezvous(OTHER, "gloo")


def test_two_processes_of_one_rank_both_end(port):
    errors = []

    def join():
        try:
            rendezvous(TWO, "gloo")
        except UserError as error:
            errors.append(str(error))

    both = [threading.Thread(target=join, daemon=True) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(timeout=30)
    assert errors == ["two processes have rank 0: set another machine_rank, or RANK, for each machine"] * 2


@pytest.mark.parametrize(
    ("world", "line"),
    [
        (TWO, "waiting for 1 of 2 processes at 127.0.0.1:{}"),
        (OTHER, r"waiting for rank 0 at 127.0.0.1:{}( \(\[Errno \d+\] Connection refused\))?"),
    ],
)
def test_who_is_awaited_is_said_and_ctrl_c_acts(world, line, port, monkeypatch, capsys):
    monkeypatch.setattr(meeting, "FIRST_NOTE_SECONDS", 0.0)
    monkeypatch.setattr(meeting, "NOTE_EVERY_SECONDS", 0.2)
    printed = []

    def note(text, **_):
        printed.append(text)
        if len(printed) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(meeting, "print", note, raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            rendezvous(world, "gloo")
    finally:
        signal.signal(signal.SIGINT, before)
    assert re.fullmatch(line.format(port), printed[2]), printed


def test_variables_of_others_are_left_alone_while_a_run_trains(monkeypatch):
    """A tracker's threads read and set them at any time. (Accelerate itself clears them for a moment.)"""
    monkeypatch.setattr("accelerate.utils.environment.clear_environment", contextlib.nullcontext)
    monkeypatch.setenv("ACCELERATE_X", "1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.delenv("A_TRACKERS_OWN", raising=False)
    before, ended, missing = dict(os.environ), threading.Event(), []

    def read():
        while not ended.is_set():
            missing.extend(name for name in before if name not in os.environ and name not in ("ACCELERATE_X",))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(20):
            with connect(World(), AccelerateConfig(use_cpu=True)) as ranks:
                start(ranks, AccelerateConfig(use_cpu=True), requested_precision="no", num_threads=1)
                assert "ACCELERATE_X" not in os.environ
                os.environ["A_TRACKERS_OWN"] = "set by a thread"
    finally:
        ended.set()
        reader.join()
    assert missing == []
    assert os.environ.pop("A_TRACKERS_OWN") == "set by a thread"
    assert dict(os.environ) == before


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] "


@pytest.mark.parametrize(
    ("error", "is_lost_peer"),
    [
        (RuntimeError(GLOO + "Connection closed by peer [127.0.0.1]:24765"), True),
        (RuntimeError(GLOO + "writev [127.0.0.1]:24765: Broken pipe"), True),
        (RuntimeError("NCCL error in: x.cpp\nncclRemoteError: A call failed possibly due to a remote process"), True),
        (PeerFailedError("rank 1 failed"), True),
        (type("DistNetworkError", (RuntimeError,), {})("failed to recv, got 0 bytes"), True),
        (RuntimeError("NCCL error in: x.cpp\nncclInvalidUsage: Duplicate GPU detected"), False),
        (ConnectionError("Connection refused by the tracker's server"), False),
        (ValueError("BadConnectionName"), False),
    ],
)
def test_only_a_lost_peer_is_taken_for_one(error, is_lost_peer, monkeypatch, capsys):
    def fail(*_):
        raise error

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(cli, "_run", fail)
    monkeypatch.setattr(cli, "_exit_now", leave)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        cli.main([])
    shown = capsys.readouterr().err
    assert end.value.code == 1
    assert shown.startswith("rank 1 ends: another process is gone (") == is_lost_peer
    assert ("Traceback" in shown) != is_lost_peer


def test_restarted_processes_do_not_find_the_keys_of_those_before(monkeypatch):
    def keys(restarts):
        monkeypatch.setattr(meeting, "_WORLDS", itertools.count())  # as in a new process
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        return {meeting._prefix(), meeting._prefix()}

    assert keys("0") == keys("0")
    assert len(keys("0") | keys("1")) == 4
