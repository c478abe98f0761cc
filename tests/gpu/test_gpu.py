"""One GPU is enough: precision, and several ranks that share it over gloo. Run with `pytest tests/gpu`."""

import functools
import json
import math
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import distributed, nn

from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.plan import make_plan
from cifar_dist.config.world import World
from cifar_dist.model.layers import GroupedBatchNorm, Groups, share_statistics, use_groups
from cifar_dist.model.optimizer import orthogonalized
from cifar_dist.run.results import Observer
from cifar_dist.runtime.distributed import connect, start
from cifar_dist.training.setup import build_trainer
from cifar_dist.training.step import WARMUP_STEPS
from tests.conftest import ROOT, make_dataset, make_recipe
from tests.worlds.harness import ON_CPU, models_in_float64, run_world

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = AccelerateConfig(path="eager.yaml", dynamo_backend="NO")
GRAPHS = AccelerateConfig()  # the default
# A change of 1e-7 in the weights, a rounding of float32, grows to percents of the loss in eight steps of so few images.
# What must be equal is therefore compared in float64 and after few steps.
SMALL = ("global_batch_size=64", "early_stopping.enabled=false")
SLOW, FAST = "optimizer.learning_rate=0.0001", "optimizer.learning_rate=0.02"


def train(runtime, *assignments, num_train: int = 512, float64: bool = False, base: str = "original"):
    """Train on brightness; return the records, the trainer and the change of each weight (float64, on the CPU)."""
    dataset, recipe = make_dataset(num_train=num_train, num_test=64), make_recipe(*SMALL, *assignments, base=base)
    plan = make_plan(recipe, world_size=runtime.world.size, sizes=dataset.sizes, device_type=runtime.device.type)
    with models_in_float64() if float64 else nullcontext():
        trainer = build_trainer(recipe, plan, dataset, runtime, Observer())
    before = weights_of(trainer)
    records = trainer.fit()
    return records, trainer, weights_of(trainer) - before


def weights_of(trainer) -> torch.Tensor:
    return torch.cat([each.detach().double().cpu().flatten() for each in trainer.state.model.parameters()])


def on_one(config: AccelerateConfig, precision: str, *assignments, **named):
    with connect(World(), config) as ranks:
        records, trainer, change = train(start(ranks, config, requested_precision=precision), *assignments, **named)
        return records, change, trainer.runtime


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_a_gpu_trains_what_a_cpu_does(stem):
    """Two steps: the same order and draws, so that only the images' own rounding (float32) differs."""
    settings = ("epochs=1", SLOW, f"stem={stem}", "dropout=0.2", "augmentation.mixup=0.5", "validation_size=64")
    (gpu,), changed, _ = on_one(GPU, "no", *settings, num_train=192, float64=True)
    (cpu,), expected, _ = on_one(ON_CPU, "no", *settings, num_train=192, float64=True)
    assert gpu.step == 2
    assert gpu.train_loss == pytest.approx(cpu.train_loss, rel=1e-4)
    assert gpu.val_loss == pytest.approx(cpu.val_loss, rel=1e-3)
    assert float((changed - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize(
    ("config", "precision"), [(GPU, "bf16"), (GPU, "fp16"), (GRAPHS, "bf16")], ids=["bf16", "fp16", "replayed"]
)
def test_reduced_precision_learns_and_is_what_it_says(config, precision):
    if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no bf16 arithmetic")
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, output: seen.add(output.dtype) if isinstance(module, nn.Conv2d) else None
    )
    try:
        records, _, runtime = on_one(config, precision, FAST, "epochs=3")
    finally:
        handle.remove()
    assert (runtime.precision, runtime.compute.replays) == (precision, config is GRAPHS)
    assert seen == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert (runtime.state()["scaler"] is not None) == (precision == "fp16")
    assert records[-1].train_loss < records[0].train_loss


@pytest.mark.parametrize("config", [GPU, GRAPHS], ids=["eager", "replayed"])
@pytest.mark.parametrize("recipe", ["original", "standard", "long"])
def test_no_step_makes_the_host_wait_for_the_device(recipe, config):
    """torch raises where anything synchronises; only the reports, once in many steps, may."""
    # Of one size: a recording itself waits, and each size has its own.
    changes = ("validation_size=0", "ema_decay=0.9", "image_size_schedule=null")
    dataset, settings = make_dataset(num_train=4096), make_recipe(*changes, base=recipe)
    with connect(World(), config) as ranks:
        runtime = start(ranks, config)
        plan = make_plan(settings, world_size=1, sizes=dataset.sizes, device_type="cuda")
        plan = replace(plan, agree_every_steps=1_000_000)
        trainer = build_trainer(settings, plan, dataset, runtime, Observer())
        assert (trainer.step.cuda_graph is not None) == (config is GRAPHS)
        steps = trainer.steps(1)
        done = len(list(islice(steps, WARMUP_STEPS + 1)))  # kernels are chosen, pinned memory taken, a step recorded
        torch.cuda.synchronize()
        trainer._agree_every = 1_000_000
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the mode is a prototype, as it says once
                torch.cuda.set_sync_debug_mode("error")
            assert len(list(steps)) == plan.steps_per_epoch - done > 0
        finally:
            torch.cuda.set_sync_debug_mode("default")


REPLAYED = {
    "original": ("original", ("stem=small", "gradient_clipping=1.0", "dropout=0.2", "augmentation.mixup=0.5")),
    # At its own rate SGD would let the rates' rounding grow to 3e-5 of the change.
    "standard": ("standard", ("image_size_schedule=[[16, 0.5], [32, 1.0]]", "optimizer.sgd_learning_rate=0.0001")),
    "adamw": ("original", ("stem=small", "optimizer.name=adamw", "optimizer.nesterov=false")),
    "groups": ("original", ("stem=small", "batch_norm_group_size=16", "ema_decay=0.9")),
}


@pytest.mark.parametrize("case", REPLAYED)
def test_replayed_steps_train_what_steps_do(case):
    """Five steps of a size, about two of them replayed, and the epoch's short last one; the rate changes each time."""
    base, settings = REPLAYED[case]
    sizes = 2 if case == "standard" else 1
    settings = ("epochs=1", "validation_size=0", SLOW, "schedule.name=cosine", *settings)
    named = {"num_train": 64 * 5 * sizes + 20, "float64": True, "base": base}
    (eager,), expected, _ = on_one(GPU, "no", *settings, **named)
    (replayed,), changed, runtime = on_one(GRAPHS, "no", *settings, **named)
    assert runtime.compute.replays
    assert replayed.train_loss == pytest.approx(eager.train_loss, rel=1e-5)
    assert replayed.train_acc == pytest.approx(eager.train_acc, abs=0.01)
    # In float64 but for the rates. Most of Muon's change is that of the first step, which brings the filters to their
    # norm; any other step left out would be 3e-4 of it.
    assert float((changed - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own use
def test_a_compiled_model_trains_as_an_eager_one():
    compiled = AccelerateConfig(path="x.yaml", dynamo_backend="INDUCTOR")
    settings, named = (SLOW, "epochs=1", "validation_size=0"), {"num_train": 64 * 6, "float64": True}
    (eager, expected, _), (other, changed, runtime) = (
        on_one(config, "no", *settings, **named) for config in (GPU, compiled)
    )
    assert (runtime.compute.compiler, runtime.compute.replays) == ("INDUCTOR", False)
    assert other[0].train_loss == pytest.approx(eager[0].train_loss, rel=1e-5)
    assert float((changed - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("shape", [(64, 27), (64, 576), (512, 4608)])
def test_muon_orthogonalizes_in_tf32_as_the_convolutions_compute(monkeypatch, shape):
    before = torch.backends.cuda.matmul.fp32_precision
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    steep = left * torch.logspace(0, -5, min(shape)) @ right
    for values, limit in ((matrix, 0.01), (steep, 0.05)):
        exact, (rounded,) = orthogonalized([values])[0], orthogonalized([values.cuda()])
        assert 0 < float((rounded.cpu() - exact).norm() / exact.norm()) < limit
    assert torch.backends.cuda.matmul.fp32_precision == before
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    (exactly,) = orthogonalized([matrix.cuda()])
    assert float((exactly.cpu() - orthogonalized([matrix])[0]).norm() / matrix.norm()) < 1e-4


def ranks_on_one_gpu(runtime, *, assignments, precision):
    """Train on a shared GPU; return losses, a sum that must be equal on all ranks, and the scaler's state."""
    assert (runtime.device.type, distributed.get_backend(), runtime.precision) == ("cuda", "gloo", precision)
    records, trainer, _ = train(runtime, *assignments, num_train=195, float64=precision == "no")
    state = trainer.state.model.state_dict()
    scaler = runtime.state()["scaler"]
    return [record.train_loss for record in records], float(sum(v.double().sum() for v in state.values())), scaler


def batch_norm_on_one_gpu(runtime):
    """The largest difference between SyncBatchNorm on shares, one of them empty, and BatchNorm on the whole batch."""
    own = [[0, 1, 2, 3, 4, 5, 6], []][runtime.world.rank]
    generator, worst = torch.Generator().manual_seed(1), 0.0
    for dtype in (torch.float32, torch.bfloat16):
        images, gradient = (torch.randn(7, 5, 6, 4, generator=generator).to("cuda", dtype) for _ in range(2))
        plain, shared = nn.BatchNorm2d(5, device="cuda"), nn.Sequential(nn.BatchNorm2d(5, device="cuda"))
        shared = share_statistics(shared, num_ranks=2)
        assert isinstance(shared[0], GroupedBatchNorm)
        ghost = use_groups(nn.Sequential(nn.BatchNorm2d(5, device="cuda")), Groups(count=4, num_ranks=2))
        ghost[0].groups.images = 7  # too few for four groups: one over both ranks
        whole = images.clone().requires_grad_()
        expected = plain(whole)
        expected.backward(gradient)
        for layer in (shared, ghost):
            part = images[own].clone().requires_grad_()
            output = layer(part)
            output.backward(gradient[own].to(output.dtype))
            pairs = [(layer[0].running_mean, plain.running_mean), (layer[0].running_var, plain.running_var)]
            if own:
                pairs += [(output, expected[own]), (part.grad, whole.grad[own])]
            scale = 1 if dtype == torch.float32 else 0.01
            worst = max(worst, *(float((a.float() - b.float()).abs().max()) * scale for a, b in pairs))
    return worst


def share_one_gpu(*checks, precision):
    return run_world(2, *checks, config=GPU, precision=precision, share_gpu=True)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_two_ranks_on_one_gpu_stay_equal_in_reduced_precision(precision):
    check = functools.partial(ranks_on_one_gpu, assignments=("epochs=3", "stem=small", FAST), precision=precision)
    ((first, second),) = share_one_gpu(check, precision=precision)
    assert first == second, "the ranks differ"
    assert all(math.isfinite(loss) for loss in first[0])


@pytest.mark.parametrize("group_size", ["null", "16"])
def test_two_ranks_on_one_gpu_train_as_one_does(group_size):
    settings = ("epochs=2", "stem=small", SLOW, f"batch_norm_group_size={group_size}")
    check = functools.partial(ranks_on_one_gpu, assignments=settings, precision="no")
    ((first, second),) = share_one_gpu(check, precision="no")
    assert first == second, "the ranks differ"
    records, *_ = on_one(GPU, "no", *settings, num_train=195, float64=True)
    assert first[0] == pytest.approx([record.train_loss for record in records], rel=1e-5)


def test_batch_norm_over_ranks_on_one_gpu():
    ((first, second),) = share_one_gpu(batch_norm_on_one_gpu, precision="no")
    assert max(first, second) < 1e-4


def launch(*arguments: str, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def test_an_fp16_run_goes_on_with_its_scaler(tmp_path):
    quick = ("--dataset", "shapes", "--recipe", "original", "--set", "stem=small", "--precision", "fp16", "--quiet")
    assert launch(*quick, "--epochs", "1", "--run-dir", "run", cwd=tmp_path).returncode == 0
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)
    assert saved["scaler"]["scale"] > 0
    again = launch("--resume", "run", "--epochs", "2", "--quiet", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    later = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)
    steps = later["scaler"]["_growth_tracker"] - saved["scaler"]["_growth_tracker"]
    assert steps > 0 or later["scaler"]["scale"] != saved["scaler"]["scale"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["device"], summary["precision"], summary["epochs"]) == ("cuda", "fp16", 2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one_does_over_nccl(tmp_path):
    quick = ("--dataset", "shapes", "--recipe", "original", "--set", "stem=small", "--epochs", "1", "--precision", "no")
    losses = []
    for count in (1, 2):
        ended = launch(*quick, "--num-processes", str(count), "--run-dir", f"run{count}", cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
        record = json.loads((tmp_path / f"run{count}" / "metrics.jsonl").read_text())
        losses.append(record["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
