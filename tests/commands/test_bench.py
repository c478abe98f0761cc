"""What `bench` measures, and that its floor is one."""

import contextlib
import functools
import gc
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import weakref
from collections import Counter
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cifar_dist.baselines.bare import BareStep
from cifar_dist.cli import main
from cifar_dist.commands import bench
from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.errors import UserError
from cifar_dist.config.options import BenchOptions
from cifar_dist.config.world import World
from cifar_dist.display.tables import format_bench
from cifar_dist.run.results import Observer
from cifar_dist.runtime import graphs, timing
from cifar_dist.runtime.interrupt import StoppedBeforeTraining
from cifar_dist.runtime.timing import Contender, alternate
from cifar_dist.training import sweep
from cifar_dist.training.setup import build_trainer
from cifar_dist.training.step_profile import flops_per_image, memory_by_part, peak_flops
from tests.commands.test_train import NarrowResNet, small_world_in
from tests.conftest import ROOT, make_dataset, make_recipe

# The original script has two workers, of which torch warns on one core.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

BENCH = ["bench", "--recipe", "original", "--precision", "no", "--seconds", "0.01", "--set", "global_batch_size=8"]


@pytest.fixture
def narrow(tmp_path, monkeypatch):
    """A narrow network, few images and the least number of rounds."""
    monkeypatch.setattr(timing, "_ROUNDS", 3)
    monkeypatch.setattr(bench, "random_dataset", lambda *_: make_dataset())
    with small_world_in(tmp_path):
        yield


@pytest.mark.usefixtures("narrow")
def test_it_measures_and_writes_its_figures(capsys):
    assert main([*BENCH, "ema_decay=0.9", "--json", "bench.json"]) == 0
    result = json.loads(Path("bench.json").read_text())
    assert all(result[f"{name}_images_per_second"] > 1 for name in ("bare_step", "loop", "script", "peer"))
    for name in ("bare", "script", "peer"):
        low, middle, high = (result[f"loop_over_{name}{end}"] for end in ("_min", "", "_max"))
        assert 0 < low <= middle <= high
    assert list(result["seconds_by_part"]) == [
        "data", "augmentation", "normalization", "forward", "backward", "optimizer", "metrics", "progress", "average",
    ]  # fmt: skip
    assert all(seconds > 0 for seconds in result["seconds_by_part"].values())
    assert result["model_flop_utilisation"] is None, "nobody knows a processor's peak"
    shown = capsys.readouterr().out
    for name in ("bare step", "our loop", "original script", "common peer"):
        assert re.search(rf"^{name} +[\d,]+", shown, re.MULTILINE), shown
    assert "TFLOP/s of the model" in shown
    assert result["compiler"] is None and "milliseconds a step, by part, each waited for:" in shown
    replayed = format_bench({**result, "compiler": "CUDAGRAPHS"})
    assert any("each given to the GPU by itself, not replayed, and waited for" in line for line in replayed)
    assert re.search(r"^\d+ rounds, in which each has its turn: about [\d.]+ (s|min)", shown, re.MULTILINE), shown
    assert re.search(r"^MiB by part: images 0, model 0, gradients 0, optimizer 0, average 0,", shown, re.MULTILINE)


@pytest.mark.usefixtures("narrow")
def test_a_sweep_measures_every_choice_and_goes_on_where_a_compiler_fails(capsys, monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda model, **_: SimpleNamespace(train=lambda: no_compiler))
    assert main([*BENCH, "--sweep", "--json", "sweep.json"]) == 0
    result = json.loads(Path("sweep.json").read_text())
    rows = result["sweep"]
    choices = {(row["precision"], row["memory_format"], row["compiler"], row["fused"]) for row in rows}
    # Where a network fails or is hopelessly slow, the second kernel of the optimiser is not tried.
    assert len(rows) == len(choices)
    assert {choice[:3] for choice in choices} == set(
        product(("no", "bf16"), ("contiguous", "channels_last"), (None, "INDUCTOR"))
    )
    assert {True, False} == {fused for *network, fused in choices if network == ["no", "channels_last", None]}
    (chosen,) = (row for row in rows if row["is_chosen"])
    assert (chosen["precision"], chosen["memory_format"], chosen["compiler"]) == ("no", "channels_last", None)
    rates = [row["images_per_second"] or 0 for row in rows]
    assert rates == sorted(rates, reverse=True)
    assert result["chosen_over_fastest"] == chosen["images_per_second"] / rates[0]
    assert {row.get("failed") for row in rows if row["compiler"]} == {"no compiler here"}
    shown = capsys.readouterr().out
    assert shown.count("no compiler here") == 4
    assert shown.count("chosen") == 1


@pytest.mark.usefixtures("narrow")
def test_a_sweep_in_which_nothing_can_be_computed_is_one_line(capsys, monkeypatch):
    def out_of_memory(*_, **__):
        raise RuntimeError("out of memory\nand much more")

    monkeypatch.setattr(bench, "_bare_step", out_of_memory)
    assert main([*BENCH, "--sweep"]) == 2
    assert capsys.readouterr().err == "error: nothing can be measured here: out of memory\n"


def test_the_floor_of_replayed_steps_is_replayed_and_keeps_its_model(monkeypatch, runtime):
    """A recorded step writes to memory that the recording itself does not keep."""
    done = []

    def record(work):
        alive = weakref.ref(work.model)
        return lambda: done.append(alive() is not None)

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr("cifar_dist.model.resnet.resnet18", NarrowResNet)
    recipe = make_recipe("global_batch_size=8")
    floor = functools.partial(bench._bare_step, recipe, runtime, precision="no", layout=torch.contiguous_format)
    step = floor(compiler="CUDAGRAPHS")
    gc.collect()
    step()
    step()
    assert done == [True, True]
    assert isinstance(floor(), BareStep)


def test_what_was_asked_for_is_among_the_choices_of_a_sweep():
    for precision, compiler in (("fp16", None), ("no", "EAGER")):
        runtime = SimpleNamespace(
            device=torch.device("cpu"), precision=precision, memory_format=torch.channels_last,
            compute=SimpleNamespace(backend=compiler),
        )  # fmt: skip
        (chosen,) = (choice for choice in sweep._choices(runtime) if choice["is_chosen"])
        assert (chosen["precision"], chosen["compiler"]) == (precision, compiler)


def test_a_sweep_of_several_processes_is_refused():
    with pytest.raises(UserError, match="--sweep compares what one process can do, and there are 2: start one"):
        bench.run(BenchOptions(sweep=True), World(size=2), AccelerateConfig())


def test_an_image_size_schedule_does_not_make_our_loop_look_fast():
    recipe = bench.recipe_for_speed(BenchOptions(recipe="quick"))
    assert recipe.image_size_schedule is None


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


def test_what_comes_of_a_signal_to_the_workers_is_no_fault(capsys, monkeypatch):
    def workers_are_gone(*_):
        with contextlib.suppress(StoppedBeforeTraining):  # torch raises its own in its place
            os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    monkeypatch.setattr(bench, "_measure", workers_are_gone)
    assert main(BENCH) == 75
    assert capsys.readouterr().err.endswith("interrupted, with nothing left to save\n")


@pytest.mark.full
def test_a_signal_to_all_processes_of_a_measurement_is_one_line():
    """As `timeout` sends it: to the loader's workers too."""
    command = [sys.executable, str(ROOT / "launch.py"), *BENCH[:-1], "global_batch_size=16", "--seconds", "30"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **pipes) as process:
        while "rounds, in which each" not in process.stdout.readline():
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (75, "interrupted, with nothing left to save\n")


def test_no_measured_step_is_a_short_one():
    assert [len(bench.random_dataset(8, batch).train) for batch in (512, 8192)] == [19_968, 32_768]


def test_loops_take_turns(runtime):
    calls = []
    contenders = [Contender(name, lambda name=name: calls.append(name)) for name in ("a", "b")]
    reports = []
    rounds = alternate(contenders, 8, 0.01, runtime, lambda *report: reports.append(report))
    assert [done for done, *_ in reports] == list(range(17))
    assert {(count, seconds > 0) for _, count, seconds in reports} == {(16, True)}
    assert len(rounds) == 16
    assert all(len(rates) == 2 for rates in rounds)
    # The first, a look, warm-up, a longer look, then 16 rounds in an order that is turned round each time.
    # Runs of one loop count as one.
    assert re.sub(r"(.)\1+", r"\1", "".join(calls)) == re.sub(r"(.)\1+", r"\1", 4 * "ab" + 8 * "abba")


def test_what_a_step_holds_and_computes(runtime):
    dataset, recipe = make_dataset(num_train=256), make_recipe("stem=cifar", "global_batch_size=16", "ema_decay=0.9")
    plan = bench.make_plan(recipe, world_size=1, sizes=dataset.sizes, device_type="cpu")
    parts = memory_by_part(build_trainer(recipe, plan, dataset, runtime, Observer()))
    weights = 11_173_962 * 4 / 2**20
    assert parts["gradients"] == parts["average"] == pytest.approx(weights)
    assert parts["optimizer"] == pytest.approx(weights, abs=0.01)
    assert parts["model"] == pytest.approx(weights, abs=0.1)
    assert (parts["images"], parts["batch"]) == (0.75, 0.1875)
    # Kept for the backward pass, 16 images: the inputs of 20 convolutions, and of the BatchNorm and ReLU after them.
    assert 16 * 2.5 < parts["activations"] < 16 * 6
    # 0.5559 G multiply-adds forward (arXiv 1512.03385's shapes at 32 pixels), twice that backward, two operations each.
    assert flops_per_image(recipe, 10) == pytest.approx(6 * 0.5559e9, rel=0.01)
    assert peak_flops(runtime) is None


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA A100-SXM4-40GB", "no", 156e12),
        ("NVIDIA GH200 480GB", "bf16", 989.4e12),
        ("NVIDIA L40S", "fp16", 362e12),
        ("NVIDIA L40", "fp16", None),
        ("NVIDIA T400 4GB", "fp16", None),
        ("Some New Card", "bf16", None),
    ],
)
def test_peaks_of_cards(monkeypatch, name, precision, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(SimpleNamespace(device=torch.device("cuda"), precision=precision)) == peak


def test_the_gpu_script_does_each_step_once_and_a_failed_one_again(tmp_path):
    """With a `python` that only notes what it was asked for."""
    (tmp_path / "python").write_text(
        '#!/bin/sh\ncase "$1" in -c) echo 2; exit;; esac\necho "$@" >>"$CALLS"\n'
        'case "$*" in *--sweep*"$FAILING"*) exit 3;; *accuracy.py*run*"--only long"*) exit ${LONG:-0};; esac\n'
    )
    (tmp_path / "python").chmod(0o755)
    calls, out = tmp_path / "calls", tmp_path / "out"

    def gpu_script(**environ: str) -> tuple[int, list[str]]:
        calls.write_text("")
        paths = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CALLS": str(calls), "CIFAR_DIST_TEST_DATA": "data"}
        command = [str(ROOT / "benchmarks" / "gpu.sh"), str(out)]
        result = subprocess.run(command, env={**paths, **environ}, stdout=subprocess.DEVNULL, timeout=60, check=False)
        return result.returncode, calls.read_text().splitlines()

    assert gpu_script(MINUTES="-1") == (75, [])
    code, first = gpu_script(FAILING="standard")
    assert code == 1
    words = ("tests/gpu", "--jobs 6", "bench --recipe original", "--sweep", "limit.py", "scaling.py", "startup.py")
    for word in (*words, "--seed 1"):
        assert any(word in call for call in first), word
    assert not any("table" in call for call in first), "a table of what is not there"
    code, second = gpu_script(FAILING="nothing")
    assert code == 0
    assert [call.split()[:4] for call in second[:-1]] == [["launch.py", "bench", "--recipe", "standard"]]
    assert "--sweep" in second[0] and "accuracy.py table" in second[-1]
    assert gpu_script(FAILING="nothing") == (0, [])
    out = tmp_path / "again"
    code, calls_made = gpu_script(FAILING="nothing", LONG="75")
    assert code == 75, "a run that was stopped and saved is not a failure"
    code, calls_made = gpu_script(FAILING="nothing")
    assert code == 0 and len(calls_made) == 2 and "--only long" in calls_made[0]
