"""The measurements of `bench`, its lower bound, and the scripts in benchmarks/."""

import gc
import json
import re
import runpy
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models._api import BUILTIN_MODELS

from cifar_dist.cli import main
from cifar_dist.commands import bench
from cifar_dist.config.options import BenchOptions
from cifar_dist.display.terminal import format_bench
from tests.commands.test_train import NarrowResNet, small_world_in
from tests.conftest import ROOT, make_dataset, make_recipe

BENCH = ["bench", "--recipe", "original", "--precision", "no", "--seconds", "0.01", "--set", "global_batch_size=8"]


@pytest.fixture
def narrow(tmp_path, monkeypatch):
    """A narrow network, few images and the least number of rounds."""
    monkeypatch.setattr(bench, "_MAX_ROUNDS", 3)
    monkeypatch.setattr(bench, "random_dataset", lambda *_: make_dataset())
    with small_world_in(tmp_path):
        yield


@pytest.mark.usefixtures("narrow")
def test_it_measures_and_writes_its_figures(capsys):
    assert main([*BENCH, "ema_decay=0.9", "--json", "bench.json"]) == 0
    result = json.loads(Path("bench.json").read_text())
    assert all(result[f"{name}_images_per_second"] > 1 for name in ("bare_step", "loop"))
    assert 0 < result["loop_over_bare_min"] <= result["loop_over_bare"] <= result["loop_over_bare_max"]
    assert list(result["seconds_by_part"]) == [
        "data", "augmentation", "normalization", "forward", "backward", "optimizer", "metrics", "progress", "average",
    ]  # fmt: skip
    assert all(seconds > 0 for seconds in result["seconds_by_part"].values())
    assert result["compiler"] is None
    shown = capsys.readouterr().out
    for name in ("bare step", "our loop"):
        assert re.search(rf"^{name} +[\d,]+", shown, re.MULTILINE), shown
    assert "milliseconds a step, by part, each waited for:" in shown
    assert re.search(r"^\d+ rounds, in turns: about [\d.]+ (s|min)", shown, re.MULTILINE), shown
    replayed = format_bench({**result, "compiler": "CUDAGRAPHS"})
    assert any("each given to the GPU by itself, not replayed, and waited for" in line for line in replayed)
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    documented = set(re.findall(r"`(\w+)`", page.split("## `bench --json`")[1]))
    assert {key.removesuffix("_min").removesuffix("_max") for key in result} <= documented


def test_the_floor_of_replayed_steps_keeps_its_model(monkeypatch, runtime):
    """A graph writes to memory that the graph itself does not keep."""
    done = []

    def capture(work):
        alive = weakref.ref(work)
        return lambda: done.append(alive() is not None)

    monkeypatch.setattr(bench, "capture", capture)
    monkeypatch.setitem(BUILTIN_MODELS, "resnet18", NarrowResNet)
    recipe = make_recipe("global_batch_size=8")
    monkeypatch.setattr(runtime, "compute", replace(runtime.compute, replays=True))
    step = bench.build_bare_step(recipe, runtime)
    gc.collect()
    step()
    step()
    assert done == [True, True]


class Count(TorchDispatchMode):
    """Counts the operations that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operations(step) -> Counter:
    step()
    step()
    with Count() as count:
        step()
    return count.operations


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_floor_does_what_twenty_lines_do_and_nothing_else(precision):
    floor = runpy.run_path(str(ROOT / "benchmarks" / "floor.py"))
    # The stock stem's last layers are matrix products in ours alone (tests/unit/test_convolution.py).
    theirs, ours = (operations(floor[name]("cifar", 2, precision)) for name in ("twenty_lines", "bare_step"))
    assert sum(theirs.values()) > 200
    assert ours == theirs


def test_all_measured_steps_are_alike():
    assert [len(bench.random_dataset(8, batch).train) for batch in (512, 8192)] == [19_968, 32_768]
    assert bench.recipe_for_speed(BenchOptions(recipe="quick")).image_size_schedule is None


def test_loops_take_turns(runtime):
    calls, reports = [], []
    steps = [lambda name=name: calls.append(name) for name in ("a", "b")]
    rounds = bench.alternate(steps, 8, 0.01, runtime, reports.append)
    assert len(reports) == 1 and reports[0].startswith("16 rounds, in turns: about ")
    assert [len(rates) for rates in rounds] == [2] * 16
    # Warm-up, a look, then 16 rounds in an order that is turned round each time; runs of one loop count as one.
    assert re.sub(r"(.)\1+", r"\1", "".join(calls)) == re.sub(r"(.)\1+", r"\1", 2 * "ab" + 8 * "abba")


@pytest.mark.full
@pytest.mark.usefixtures("narrow")
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # the original script has two workers
@pytest.mark.parametrize(
    ("script", "shown"),
    [
        ("baselines", r"^(original script|common peer) +[\d,]+ +[\d.]+ x as fast"),
        ("sweep", r"^no +channels_last +none +fused +[\d,]+ +[\d,]+ to [\d,]+ +chosen"),
    ],
)
def test_the_scripts_measure_the_same_loop(monkeypatch, capsys, script, shown):
    def no_compiler(*_, **__):
        raise RuntimeError("no compiler here\nand much more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *BENCH[1:]])
    runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"), run_name="__main__")
    lines = capsys.readouterr().out
    assert len(re.findall(shown, lines, re.MULTILINE)) == {"baselines": 2, "sweep": 1}[script], lines
    assert lines.count("no compiler here") == {"baselines": 0, "sweep": 4}[script]


def test_the_gpu_script_does_each_step_once_and_a_failed_one_again(tmp_path):
    """With a `python` that only notes what it was asked for."""
    calls = tmp_path / "calls"
    (tmp_path / "python").write_text(
        f'#!/bin/sh\ncase "$1" in -c) echo 2; exit;; esac\necho "$@" >>{calls}\n'
        'case "$*" in *sweep.py*"$FAILING"*) exit 3;; *accuracy.py*run*"--only long"*) exit ${LONG:-0};; esac\n'
    )
    (tmp_path / "python").chmod(0o755)

    def gpu_script(**environ: str) -> tuple[int, list[str]]:
        calls.write_text("")
        environ = {"FAILING": "nothing", "CIFAR_DIST_TEST_DATA": "data"} | environ
        environ["PATH"] = f"{tmp_path}:/usr/bin:/bin"
        command = [str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")]
        code = subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, timeout=60, check=False).returncode
        return code, [" ".join(call.split()[:3]) for call in calls.read_text().splitlines()]

    assert gpu_script(MINUTES="-1") == (75, [])
    code, first = gpu_script(FAILING="standard", LONG="75")
    assert code == 1 and len(first) > 30
    assert gpu_script(LONG="75")[0] == 75, "a run that was stopped and saved is not a failure"
    code, last = gpu_script()
    assert (code, len(last)) == (0, 2), "the run that was stopped, and the table"
    assert gpu_script() == (0, [])
