"""What the launcher would start, and with which words; starting it is tests/launching's."""

import dataclasses
import os
import signal
import subprocess

import pytest

from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.runtime.launch import NUM_THREADS, _Signals, agent_arguments, child_environment, launch
from tests.conftest import ROOT

CONFIG = AccelerateConfig(path="x.yaml", num_processes=2)


def test_a_machine_starts_its_share():
    assert agent_arguments(CONFIG, 2) == ["--nproc-per-node=2", "--standalone", "-m", "cifar_dist"]
    config = AccelerateConfig(
        num_processes=8, num_machines=2, machine_rank=1, main_process_ip="10.0.0.1", main_process_port=1234
    )
    assert agent_arguments(config, 8) == [
        "--nproc-per-node=4", "--nnodes=2", "--node-rank=1", "--master-addr=10.0.0.1", "--master-port=1234",
        "--rdzv-conf=timeout=10800",
        "-m", "cifar_dist",
    ]  # fmt: skip
    assert "--master-port=29500" in agent_arguments(dataclasses.replace(config, main_process_port=None), 8)


def test_an_outer_launchers_words_do_not_leak():
    outer = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True", "PET_NNODES": "2"}
    child = child_environment({**outer, "HOME": "/h", "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, CONFIG)
    assert not [name for name in child if name.startswith(("ACCELERATE_", "PET_", "TORCHELASTIC_"))]
    assert (child["HOME"], child["OMP_NUM_THREADS"]) == ("/h", "1")
    assert NUM_THREADS not in child


def test_what_somebody_wished_is_handed_down():
    child = child_environment({"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}, CONFIG)
    assert (child[NUM_THREADS], child["ACCELERATE_USE_CPU"]) == ("1", "true")
    child = child_environment({"ACCELERATE_MIXED_PRECISION": "bf16", "OMP_NUM_THREADS": "3"}, CONFIG)
    assert (child[NUM_THREADS], child["OMP_NUM_THREADS"], child["ACCELERATE_MIXED_PRECISION"]) == ("3", "3", "bf16")
    config = AccelerateConfig(path="x.yaml", use_cpu=True, mixed_precision="fp16")
    child = child_environment({"PYTHONPATH": "/mine"}, config)
    assert (child["ACCELERATE_USE_CPU"], child["ACCELERATE_MIXED_PRECISION"]) == ("true", "fp16")
    assert child["PYTHONPATH"] == f"{ROOT}:/mine"


@pytest.mark.skipif(not hasattr(signal, "SIGUSR2"), reason="Windows has no such signals")
@pytest.mark.parametrize("heard_by", [0, 1, 2])
def test_a_signal_waits_for_nobody_who_does_not_hear_yet(tmp_path, heard_by):
    """The agent's own helpers, and interpreters that are being started, are not yet the processes of a training."""
    for rank in range(heard_by):
        (tmp_path / f"exit-code.heard-by-{rank}").touch()
    helper = 'trap "echo heard; exit 0" USR2; echo ready; while :; do sleep 0.01; done'
    with _Signals(tmp_path, 2) as signals:
        signals.agent = subprocess.Popen(["sh", "-c", f"sh -c '{helper}' & wait"], stdout=subprocess.PIPE, text=True)
        assert signals.agent.stdout.readline() == "ready\n"
        os.kill(os.getpid(), signal.SIGUSR2)
        with signals.agent.stdout as rest:
            assert rest.read() == ("heard\n" if heard_by == 2 else "")
        signals.agent.wait()
    assert signals.code == (None if heard_by == 2 else 75)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR2"), reason="Windows has no such signals")
def test_a_signal_while_the_agent_is_started_ends_it(monkeypatch):
    start, agents = subprocess.Popen, []

    def popen(*_, **__):
        os.kill(os.getpid(), signal.SIGUSR2)
        agents.append(start(["sleep", "60"]))
        return agents[0]

    monkeypatch.setattr(subprocess, "Popen", popen)
    assert launch([], CONFIG, 2) == 75
    assert agents[0].wait() == -signal.SIGKILL
