"""Worlds for tests: several gloo ranks on this machine, forked from one process that has imported everything already.

A world is started once and many checks run in it: `run_world(2, first, second)` calls `first(runtime)` and then
`second(runtime)` on every rank, and gives, for each, what the ranks returned.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import nn
from torch.distributed import TCPStore
from torchvision.models.resnet import BasicBlock, ResNet

from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.world import World
from cifar_dist.model import resnet
from cifar_dist.runtime.device import SHARE_GPU
from cifar_dist.runtime.distributed import Runtime, connect, start
from cifar_dist.training import setup

TIMEOUT_S = 240
"""In which some rank must end some check."""
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["cifar_dist.training.setup", "cifar_dist.training.session", "tests.worlds.harness"])

Check = Callable[[Runtime], Any]

ON_CPU = AccelerateConfig(use_cpu=True)


def run_world(
    size: int, *checks: Check, config: AccelerateConfig = ON_CPU, precision: str = "no", share_gpu: bool = False
) -> list[list[Any]]:
    """Run the checks on `size` ranks, one thread each; give a list for each check with what each rank returned."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    pipes, processes = [], []
    for rank in range(size):
        here, there = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(
            target=_rank, args=(rank, size, store.port, checks, config, precision, share_gpu, there), daemon=True
        )
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        returned: list[list[Any]] = [[] for _ in range(size)]
        waiting = dict(zip(pipes, range(size), strict=True))
        while waiting:
            ready = wait(list(waiting), timeout=TIMEOUT_S)
            assert ready, f"ranks {sorted(waiting.values())} of {size} hang in check {min(map(len, returned))}"
            for pipe in ready:
                rank = waiting[pipe]
                failed, result = pipe.recv()
                assert not failed, f"rank {rank} of {size}:\n{result}"
                returned[rank].append(result)
                if len(returned[rank]) == len(checks):
                    del waiting[pipe]
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
    return [list(each) for each in zip(*returned, strict=True)]


class _ThinResNet18(ResNet):
    """ResNet-18 with a quarter of the channels behind its stem, for time: every rank steps all weights in float64."""

    def __init__(self, weights: None, num_classes: int) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
        self.fc = nn.Linear(128, num_classes)

    def _make_layer(self, block, planes, *arguments, **named):
        return super()._make_layer(block, planes // 4, *arguments, **named)


@contextmanager
def models_in_float64(*, thin: bool = False) -> Iterator[None]:
    """Let trainers be built whose weights and images are float64, so that rounding hides nothing."""

    def build(*arguments, **named):
        model = original(*arguments, **named).double()
        model.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
        return model

    original, setup.build_resnet = setup.build_resnet, build
    theirs, resnet.resnet18 = resnet.resnet18, _ThinResNet18 if thin else resnet.resnet18
    try:
        yield
    finally:
        setup.build_resnet, resnet.resnet18 = original, theirs


def _rank(
    rank: int,
    size: int,
    port: int,
    checks: tuple[Check, ...],
    config: AccelerateConfig,
    precision: str,
    share_gpu: bool,
    pipe: Connection,
) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    if share_gpu:
        os.environ[SHARE_GPU] = "1"
    try:
        torch.set_num_threads(1)
        with connect(World.from_environment(os.environ), config) as ranks:
            runtime = start(ranks, config, typed_precision=precision, num_threads=1)
            for check in checks:
                pipe.send((False, check(runtime)))
            ranks.exchange([])  # nobody leaves while another still talks
    except BaseException:
        pipe.send((True, traceback.format_exc()))
        os._exit(1)
