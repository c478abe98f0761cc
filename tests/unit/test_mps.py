"""Nothing that MPS lacks is used, checked without an MPS device.

A dispatch mode records every operator of an epoch and its evaluation on the CPU. It follows the tensors that would be
on the device, from the weights and images on.
"""

import functools
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchgen
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.plan import make_plan
from cifar_dist.config.world import World
from cifar_dist.run.results import Observer
from cifar_dist.runtime.device import choose_compute
from cifar_dist.training import setup
from cifar_dist.training.evaluation import EvaluationSet
from cifar_dist.training.setup import build_trainer
from tests.conftest import make_dataset, make_recipe
from tests.unit.test_model import build_narrow

SERVES = {"MPS", "CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"}


@functools.cache
def kernels() -> dict[str, set[str]]:
    """Return the dispatch keys of each operator's kernels, from torch's table; without a key it is composite."""
    file = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = {entry["func"].split("(")[0]: entry for entry in yaml.load(file.read_text(), yaml.CSafeLoader)}
    found = {}
    for name, entry in entries.items():
        dispatch = entries[entry["structured_delegate"]] if "structured_delegate" in entry else entry
        keys = ",".join(dispatch.get("dispatch", ["CompositeImplicitAutograd"]))
        found[name] = {key.strip() for key in keys.split(",")}
    return found


def tensors(values) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))


class OperatorsOnDevice(TorchDispatchMode):
    """Follows the device's tensors and records the operators that MPS lacks."""

    def __init__(self, *roots: Tensor) -> None:
        super().__init__()
        self.on_device = WeakIdKeyDictionary()
        self.complaints: set[str] = set()
        self.operators: set[str] = set()
        for root in roots:
            self.on_device[root] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        name += f".{func._schema.overload_name}" if func._schema.overload_name else ""
        result = func(*args, **kwargs)
        if not any(tensor in self.on_device for tensor in tensors((args, kwargs))):
            return result
        self.operators.add(name)
        if kwargs.get("non_blocking") or (name.startswith("copy_") and any(value is True for value in args)):
            self.complaints.add(f"{name}: a non-blocking copy")
        if func.namespace == "aten" and not SERVES & kernels().get(name, set()):
            self.complaints.add(f"{name}: no kernel for MPS")
        for tensor in tensors(result):
            self.on_device[tensor] = True
            if tensor.dtype == torch.float64:
                self.complaints.add(f"{name}: float64")
            is_channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
            if is_channels_last and not tensor.is_contiguous():
                self.complaints.add(f"{name}: channels_last")
        return result


EVERYTHING = (
    "epochs=1", "validation_size=8", "global_batch_size=32", "dropout=0.2", "ema_decay=0.9", "label_smoothing=0.1",
    "gradient_accumulation_steps=2", "gradient_clipping=1", "image_size_schedule=[[24, 0.5], [32, 1]]",
    "augmentation.crop_mode=reflect", "augmentation.cutout=8", "augmentation.mixup=1", "augmentation.cutmix=1",
    "augmentation.affine_degrees=10", "augmentation.affine_translate=0.1", "augmentation.affine_scale=0.1",
)  # fmt: skip


def train_and_evaluate(runtime, monkeypatch, *assignments) -> OperatorsOnDevice:
    """Train an epoch and evaluate as on MPS; return the operators."""
    dataset = make_dataset(num_train=64, num_test=30)
    recipe = make_recipe(*EVERYTHING, *assignments)
    plan = make_plan(recipe, world_size=1, sizes=dataset.sizes, device_type="mps")
    monkeypatch.setattr(runtime, "memory_format", torch.contiguous_format)
    monkeypatch.setattr(setup, "build_network", build_narrow)
    monkeypatch.setattr(setup, "use_dense_products", lambda model: None)  # which are taken on a CPU alone
    trainer = build_trainer(recipe, plan, dataset, runtime, Observer())
    test, state = dataset.test, trainer.state
    roots = [each for model in (state.model, state.ema.model) for each in (*model.parameters(), *model.buffers())]
    batches = trainer.batches
    roots += [batches.data.images, batches.data.labels, test.images, test.labels, batches.normalize.scale]
    mode = OperatorsOnDevice(*roots, batches.normalize.shift)

    def leave(tensor):
        """Copy as `Tensor.cpu` does on a Mac; the copy is no longer followed."""
        copy = tensor.clone()
        mode.on_device.pop(copy, None)
        return copy

    def pin(tensor):
        """Without an accelerator torch refuses this before any operator is called."""
        mode.complaints.add("pin_memory: pinned memory")
        return tensor

    monkeypatch.setattr(torch.Tensor, "cpu", leave)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    with mode:
        trainer.fit()
        images = EvaluationSet(
            data=test, indices=torch.arange(len(test)), class_names=dataset.class_names, recipe=recipe, runtime=runtime
        )
        images.predict(state.evaluated_model, Observer(), tta="six")
    return mode


OPTIMIZERS = {
    "sgd": (),
    "nesterov": ("optimizer.nesterov=true", "optimizer.decay_norm_and_bias=false"),
    "adamw": ("optimizer.name=adamw", "optimizer.learning_rate=0.001"),
    "muon": ("optimizer.name=muon",),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_epoch_uses_nothing_that_mps_lacks(runtime, monkeypatch, optimizer):
    used = train_and_evaluate(runtime, monkeypatch, *OPTIMIZERS[optimizer])
    assert used.complaints == set()
    assert {"convolution", "convolution_backward", "index.Tensor", "argmax"} <= used.operators


@pytest.fixture
def mac(monkeypatch):
    """A Mac with macOS 14, for the functions of torch and platform that are called."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(platform, "mac_ver", lambda: ("14.5", ("", "", ""), "arm64"))


def test_a_mac_trains_on_mps_in_float32(mac):
    compute = choose_compute(AccelerateConfig(), {}, World())
    assert (compute.device_type, compute.precision, compute.notes) == ("mps", "no", ())
    assert choose_compute(AccelerateConfig(use_cpu=True), {}, World()).device_type == "cpu"
    wish = choose_compute(AccelerateConfig(mixed_precision="fp16"), {}, World())
    assert (wish.precision, wish.notes) == ("fp16", ())
