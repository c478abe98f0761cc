"""The world is read once from the environment; its ranks meet at rank 0's store, and signals act meanwhile."""

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
from cifar_dist.runtime import ranks as module
from cifar_dist.runtime.distributed import connect, start
from cifar_dist.runtime.ranks import rendezvous

TWO = World(rank=0, size=2, local_rank=0, local_size=1, launcher="torchrun")
OTHER = World(rank=1, size=2, local_rank=0, local_size=1, launcher="torchrun")
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n[1-2]"}
SLURM = {"SLURM_STEP_ID": "2", "SLURM_JOB_ID": "71", "SLURM_STEP_NODELIST": "gpu[07-09,12]"}


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        ({}, World()),
        ({"WORLD_SIZE": "1", "RANK": "0"}, World(launcher="torchrun")),
        (
            {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            World(rank=3, size=4, local_rank=1, local_size=2, launcher="torchrun"),
        ),
        (
            {**SLURM, "SLURM_PROCID": "4", "SLURM_NTASKS": "5", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}
            | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1"},
            World(
                rank=4, size=5, local_rank=0, local_size=1, launcher="slurm",
                main_address="gpu07", main_port=12_000 + 71 * 31 + 2,
            ),
        ),
        (
            {**SLURM, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "MASTER_ADDR": "a"}
            | {"SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_PORT": "1234"},
            World(rank=1, size=2, local_rank=1, local_size=2, launcher="slurm"),
        ),
        (
            {**SLURM, "SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
            | {"SLURM_STEP_TASKS_PER_NODE": "1,3", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            World(rank=2, size=4, local_rank=1, local_size=3, launcher="slurm"),
        ),
        ({**SLURM, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, World()),  # one task may start processes itself
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "3"}, World()),  # a salloc shell is no task
        ({**SLURM, "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, World()),  # nor is this one
    ],
)  # fmt: skip
def test_the_world_is_read_from_the_environment(environ, world):
    assert World.from_environment(environ) == world


@pytest.mark.parametrize(
    "environ",
    [
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "-1"},
        {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"},  # would wait without a word
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},  # ranks would not agree on how many share a machine
        {"OMPI_COMM_WORLD_SIZE": "2"},  # two worlds of one
    ],
)
def test_a_broken_world_is_refused(environ):
    with pytest.raises(UserError, match=r"RANK|WORLD_SIZE"):
        World.from_environment(environ)


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
        ("n1", "n1"), ("gpu[003-005,9],cpu1", "gpu003"), ("a,b[1-2]", "a"), ("", ""), ("a[1-2]b,c[3-4]", "a1b"),
        ("rack[0-1]node[0-3]", "rack0node0"), ("n[2-3]-[05-06]-ib[1],z", "n2-05-ib1"),
    ],
)  # fmt: skip
def test_the_first_host_of_a_slurm_step(nodelist, host):
    assert first_host(nodelist) == host


@pytest.fixture
def port(monkeypatch) -> Iterator[int]:
    """A free port that the environment names, and short patience."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(number)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(module, "_PEERS_SECONDS", 20.0)
    monkeypatch.setattr(module, "_WORLDS", itertools.repeat(0))
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
    monkeypatch.setattr(module, "FIRST_NOTE_SECONDS", 0.0)
    tried = []

    def resolve(*_, **__):
        tried.append(time.monotonic())
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", resolve)
    with pytest.raises(UserError, match=r"cannot reach MASTER_ADDR=127.0.0.1 \(rank 0\): .*Name or service not known"):
        rendezvous(OTHER, "gloo")
    assert len(tried) > 1 and tried[-1] - tried[0] > 0.4


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


def test_machines_that_chose_different_devices_both_end(port):
    """As where one of them has lost its GPU."""
    errors = []

    def join(world, backend):
        try:
            rendezvous(world, backend)
        except UserError as error:
            errors.append(str(error).partition(",")[0])

    both = [threading.Thread(target=join, args=each, daemon=True) for each in ((TWO, "gloo"), (OTHER, "nccl"))]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(timeout=30)
    assert sorted(errors) == [f"only 1 of 2 processes would use {backend}" for backend in ("gloo", "nccl")]


@pytest.mark.parametrize(
    ("world", "line"),
    [
        (TWO, "waiting for 1 of 2 processes at 127.0.0.1:{}"),
        (OTHER, r"waiting for rank 0 at 127.0.0.1:{}( \(\[Errno \d+\] Connection refused\))?"),
    ],
)
def test_who_is_awaited_is_said_and_ctrl_c_acts(world, line, port, monkeypatch, capsys):
    monkeypatch.setattr(module, "FIRST_NOTE_SECONDS", 0.0)
    monkeypatch.setattr(module, "NOTE_EVERY_SECONDS", 0.2)
    printed = []

    def note(text, **_):
        printed.append(text)
        if len(printed) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module, "print", note, raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            rendezvous(world, "gloo")
    finally:
        signal.signal(signal.SIGINT, before)
    assert re.fullmatch(line.format(port), printed[2]), printed


def test_restarted_processes_do_not_find_the_keys_of_those_before(monkeypatch):
    def keys(restarts):
        monkeypatch.setattr(module, "_WORLDS", itertools.count())  # as in a new process
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        return {module._prefix(), module._prefix()}

    assert keys("0") == keys("0")
    assert len(keys("0") | keys("1")) == 4


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
