"""What a training step is made of: its time and memory by part, and its arithmetic."""

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cifar_dist.config.recipe import Recipe
from cifar_dist.model.resnet import build_resnet
from cifar_dist.runtime.distributed import Runtime
from cifar_dist.runtime.timing import seconds_of
from cifar_dist.training.metrics import RunningSums, batch_loss
from cifar_dist.training.trainer import Trainer

# Dense peak of the matrix units, 1e12 operations a second: in 16 bits, and in float32 (torch's convolutions use TF32
# where there is any). From NVIDIA's data sheets.
_PEAK_TERAFLOPS = {
    "GH200": (989.4, 494.7),
    "H200": (989.4, 494.7),
    "H100 PCIe": (756.0, 378.0),
    "H100": (989.4, 494.7),
    "A100": (312.0, 156.0),
    "L40S": (362.0, 183.0),
    "L4": (121.0, 60.0),
    "RTX 4090": (165.2, 82.6),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
}


def seconds_by_part(trainer: Trainer, *, count: int = 5) -> dict[str, float]:
    """Time the parts of a step one by one, the device waited for after each: seconds a step."""
    batches, runtime, state = trainer.batches, trainer.runtime, trainer.state
    batch = next(iter(batches.epoch(1)))
    table, samples = batches.augmentation.draw_table(1, len(batches.data)), batch.samples.cpu()
    images = batches.data.images[: len(samples)]
    pixels = batches.augmentation.apply(images, table[samples])
    sums, made = RunningSums(runtime.device), dict[str, Tensor]()

    def forward() -> None:
        """Keep what the parts after it need."""
        made["logits"] = trainer.step.model(batch.images)
        made["loss"] = batch_loss(made["logits"], batch, trainer.recipe.label_smoothing)

    parts: dict[str, Callable[[], object]] = {
        "data": lambda: (table[samples], batches.data.images.index_select(0, batch.samples)),
        "augmentation": lambda: batches.augmentation.apply(images, table[samples]),
        "normalization": lambda: batches.normalize(pixels),
        "forward": forward,
        "backward": lambda: runtime.backward(made["loss"]),
        "optimizer": trainer.step.optimizer.step,
        "metrics": lambda: sums.add(made["loss"].detach(), made["logits"], batch.labels),
        "progress": lambda: trainer.observer.on_step(1, None),
    }
    if state.ema is not None:
        average = state.ema
        parts["average"] = lambda: average.update(state.model, 1)
    trainer.step.model.train()
    seconds = dict.fromkeys(parts, 0.0)
    for _ in range(count):
        for name, action in parts.items():
            seconds[name] += seconds_of(action, 1, runtime) / count
        trainer.step.optimizer.zero_grad()
    return seconds


def memory_by_part(trainer: Trainer) -> dict[str, float]:
    """Count what a step holds in memory, in MiB: all of it on the device that computes."""
    state, batch = trainer.state, next(iter(trainer.batches.epoch(1)))
    parameters, images = list(state.model.parameters()), trainer.batches.data.images
    parts = {
        "images": _mebibytes([images]),
        "model": _mebibytes([*parameters, *state.model.buffers()]),
        "gradients": _mebibytes(parameters),
        "optimizer": _mebibytes(each for each in tree_leaves(state.optimizer.state_dict()) if isinstance(each, Tensor)),
        "average": 0.0 if state.ema is None else _mebibytes(state.ema.model.parameters()),
        "batch": _mebibytes([batch.images]),
    }
    saved: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def count(tensor: Tensor) -> Tensor:
        """Note a tensor that is kept for the backward pass, each memory once."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    trainer.step.model.train()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = batch_loss(trainer.step.model(batch.images), batch, trainer.recipe.label_smoothing)
    parts["activations"] = sum(saved.values()) / 2**20
    del loss
    return parts


def flops_per_image(recipe: Recipe, num_classes: int) -> float:
    """Count the operations (a multiply-add is two) of one image's forward and backward pass."""
    model = build_resnet(recipe.stem, num_classes, seed=0)
    images = torch.zeros(2, 3, recipe.image_size, recipe.image_size)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return float(counter.get_total_flops()) / len(images)


def peak_flops(runtime: Runtime) -> float | None:
    """Give the device's peak in the run's precision, in operations a second; None where it is not known."""
    if runtime.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(runtime.device)
    known = next((peaks for model, peaks in _PEAK_TERAFLOPS.items() if re.search(rf"\b{model}\b", name)), None)
    return None if known is None else 1e12 * known[runtime.precision == "no"]


def _mebibytes(tensors: Iterable[Tensor]) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20
