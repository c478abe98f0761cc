"""Run a network once before training, to see that it keeps the guarantees and where its inputs hold the samples."""

import functools
import pickle
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import StochasticDepth

from cifar_dist.config.errors import UserError
from cifar_dist.model.stochastic import TRACKED

_NUM_IMAGES, _FEWER_IMAGES = 5, 3
"""Two batches: a dimension that has one size after the other holds the samples."""
_SIDES = (32, 48, 64, 75, 96, 128, 160, 192, 224, 256, 299, 384)
"""Sides in pixels, one of which is advised if the recipe's does not work."""
_OWN_STATISTICS = "normalizes each rank's images alone: use torch.nn.BatchNorm1d, 2d or 3d"
_TOLERANCE = 1e-3
"""Of the largest logit: an image alone may differ by rounding from the same image in a batch."""
_UNTRACKED = "draws random numbers{} itself, as functional.dropout does: use a layer such as torch.nn.Dropout"


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkTraits:
    """What training needs to know of a network."""

    batch_dims: Mapping[str, int | None]
    """By the name of a module whose class is in `TRACKED`: which dimension of its input holds the samples.

    None if it was not called. Modules that must stay torch's own are left out.
    """
    has_unused_parameters: bool
    """Whether a trainable parameter takes no part in the output, so that DDP must look for it."""


def probe_network(
    model: nn.Module, *, num_classes: int, sides: Sequence[int], allow_untracked_randomness: bool, name: str
) -> NetworkTraits:
    """Run a network on the CPU, in training mode, on random images with these sides in pixels.

    Its buffers and the global random states stay. Raises UserError if it cannot be trained with the guarantees.
    """
    _check_layers(model)
    was_training, watch, again = model.training, _Watch(model), _Watch(model)
    side, *smaller = sorted(set(sides), reverse=True)
    try:
        with _random_states_kept(name, watch.problems):
            output = _run(model.train(), name, side, _NUM_IMAGES, watch)
            if not isinstance(output, Tensor) or output.shape != (_NUM_IMAGES, num_classes):
                raise UserError(
                    f"{name} returns {_described(output)}:"
                    f" it must return logits (N, {num_classes}) alone, without auxiliary outputs"
                )
            if not output.requires_grad:
                raise UserError(
                    f"{name} has nothing to train: its logits must depend on a parameter with requires_grad"
                )
            with torch.no_grad():
                for other in smaller:
                    _run(model, name, other, 2, advice="set image_size_schedule=null")
                if any(shape.count(_NUM_IMAGES) > 1 for shapes in watch.shapes.values() for shape in shapes):
                    _run(model, name, side, _FEWER_IMAGES, again)
    finally:
        model.train(was_training)
    batch_dims = _find_batch_dims(watch, again)
    if watch.problems and not allow_untracked_randomness:
        allow = "--set allow_untracked_randomness=true (the result then depends on processes and resumes)"
        raise UserError(f"{watch.problems[0]}, or {allow}")
    if not watch.problems:
        _check_that_images_stay_apart(model, name, side)
    used = _parameters_behind(output)
    unused = any(each.requires_grad and id(each) not in used for each in model.parameters())
    return NetworkTraits(batch_dims=batch_dims, has_unused_parameters=unused)


def _check_layers(model: nn.Module) -> None:
    """Raise UserError for a layer whose results would depend on the batch, or on the rank's part of it."""
    for name, module in model.named_modules():
        what = _label(name, module)
        if isinstance(module, LazyModuleMixin):
            raise UserError(f"{what} is lazy: take the layer that is not, with its sizes")
        if isinstance(module, _BatchNorm):
            if type(module).forward is not _BatchNorm.forward:
                raise UserError(f"{what} {_OWN_STATISTICS}")
            if not module.track_running_stats:
                raise UserError(f"{what} depends on the batch in evaluation: set track_running_stats=True")
            if module.momentum is None:
                raise UserError(f"{what} has no momentum: set one, such as 0.1")
        if isinstance(module, _InstanceNorm) and module.track_running_stats:
            raise UserError(f"{what} keeps statistics of each rank alone: set track_running_stats=False")


def _check_that_images_stay_apart(model: nn.Module, name: str, side: int) -> None:
    """Raise UserError if the logits of an image depend on the others, apart from BatchNorm's statistics in training."""
    was_training = model.training
    for module in model.modules():
        module.training = not isinstance(module, (_BatchNorm, *TRACKED))
    with torch.no_grad():
        many, few = (_run(model, name, side, count) for count in (_NUM_IMAGES, _FEWER_IMAGES))
    model.train(was_training)
    if not torch.allclose(many[:_FEWER_IMAGES], few, rtol=0, atol=_TOLERANCE * float(many.abs().max()), equal_nan=True):
        raise UserError(f"{name} mixes the images of a batch: the logits of an image must depend on that image alone")


def _run(
    model: nn.Module, name: str, side: int, num_images: int, watch: "_Watch | None" = None, advice: str | None = None
) -> Any:
    """Return the output for images of this side. Raises UserError with `advice`, or with a side that works."""
    try:
        return _forward(model, side, num_images, watch)
    except UserError:
        raise
    except Exception as error:  # of anyone's network
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
        if advice is None:
            fitting = next((other for other in _SIDES if other != side and _works(model, other)), None)
            advice = f"set image_size={fitting}" if fitting else "the other sizes that were tried fail, too"
        raise UserError(f"{name} fails on images of {side} x {side} pixels ({reason}): {advice}") from error


def _works(model: nn.Module, side: int) -> bool:
    try:
        with torch.no_grad():
            _forward(model, side, 2)
    except Exception:
        return False
    return True


def _forward(model: nn.Module, side: int, num_images: int, watch: "_Watch | None" = None) -> Any:
    images = torch.randn(_NUM_IMAGES, 3, side, side, generator=torch.Generator().manual_seed(0))[:num_images]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with watch or nullcontext():
        return functional_call(model, buffers, (images,))


class _Watch(TorchDispatchMode):
    """Watches a forward pass: what the modules of `TRACKED` get, and which others draw random numbers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules = dict(model.named_modules())
        tracked = [name for name, module in self.modules.items() if type(module) in TRACKED]
        self.shapes: dict[str, list[list[int]]] = {name: [] for name in tracked}
        """The shape of each call's input."""
        self.problems: list[str] = []
        self._running = [""]
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for name, module in self.modules.items():
            begin = module.register_forward_pre_hook(functools.partial(self._begin, name), with_kwargs=True)
            self._handles += [begin, module.register_forward_hook(self._end, always_call=True)]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def _begin(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.append(name)
        if name in self.shapes:
            self.shapes[name].append(list((*args, *kwargs.values())[0].shape))

    def _end(self, *_: object) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, self._running[-1]
        module = self.modules[name]
        if func is torch.ops.aten.native_batch_norm.default and not isinstance(module, _BatchNorm):
            is_training, is_instance_norm = args[5], len(args[0]) == 1
            if is_training and not is_instance_norm:
                raise UserError(f"{_label(name, module)} {_OWN_STATISTICS}")
        may_draw = torch.Tag.nondeterministic_seeded in func.tags or func.namespace != "aten"
        if name in self.shapes or not may_draw:
            return func(*args, **kwargs)
        before = torch.get_rng_state()
        result = func(*args, **kwargs)
        has_generator = any(isinstance(each, torch.Generator) for each in (*args, *kwargs.values()))
        if has_generator or not torch.equal(before, torch.get_rng_state()):
            self.problems.append(f"{_label(name, module)} {_UNTRACKED.format('')}")
        return result


def _find_batch_dims(watch: _Watch, again: _Watch) -> dict[str, int | None]:
    """Return `NetworkTraits.batch_dims`. Add to the problems what draws and must stay torch's own.

    `again` has run with `_FEWER_IMAGES` if some input had several dimensions of `_NUM_IMAGES`.
    """
    found: dict[str, int | None] = {}
    for name, shapes in watch.shapes.items():
        module, others = watch.modules[name], again.shapes[name]
        calls = [
            {
                dim
                for dim in _usable_dims(module, shape)
                if shape[dim] == _NUM_IMAGES and (shape is other or other[dim : dim + 1] == [_FEWER_IMAGES])
            }
            for shape, other in zip(shapes, others if len(others) == len(shapes) else shapes, strict=True)
        ]
        is_attention = isinstance(module, nn.MultiheadAttention)
        if is_attention and (module.bias_k is not None or module.add_zero_attn):
            reason = "has add_bias_kv or add_zero_attn, which are not tracked: do without"
        elif any(dims != calls[0] or len(dims) != 1 for dims in calls):
            reason = f"gets inputs of shape {shapes[0]} for {_NUM_IMAGES} images: give it the images in one dimension"
        else:
            found[name] = calls[0].pop() if calls else None
            continue
        if (module.dropout if is_attention else module.p) > 0:
            watch.problems.append(f"{_label(name, module)} {reason}")
    return found


def _usable_dims(module: nn.Module, shape: Sequence[int]) -> set[int]:
    """Return the dimensions in which a module of `TRACKED` can have the samples."""
    if isinstance(module, nn.MultiheadAttention):
        return {0 if module.batch_first else 1} if len(shape) == 3 else set()
    if isinstance(module, StochasticDepth):
        return {0}
    if type(module) is nn.Dropout:
        return set(range(len(shape)))
    num_dims = next(n for n, kind in ((3, nn.Dropout1d), (4, nn.Dropout2d), (5, nn.Dropout3d)) if type(module) is kind)
    return {0, 1} if len(shape) == num_dims else set()


def _parameters_behind(output: Tensor) -> set[int]:
    """Return the ids of the parameters that the output is computed from."""
    found, seen, waiting = set[int](), set[Any](), [output.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # AccumulateGrad
            found.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return found


@contextmanager
def _random_states_kept(name: str, problems: list[str]) -> Iterator[None]:
    """Restore the global random states. Add to the problems that those of Python or NumPy were used."""
    before = (random.getstate(), np.random.get_state())
    try:
        with torch.random.fork_rng(devices=[]):
            yield
        after = (random.getstate(), np.random.get_state())
        for source, old, new in zip(("Python's random", "numpy.random"), before, after, strict=True):
            if pickle.dumps(old) != pickle.dumps(new):
                problems.append(f"{name} {_UNTRACKED.format(f' from {source}')}")
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _described(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {list(output.shape)} for {_NUM_IMAGES} images"
    if hasattr(output, "_fields"):
        return f"{type(output).__name__}({', '.join(output._fields)})"
    return f"a {type(output).__name__}"


def _label(name: str, module: nn.Module) -> str:
    return f"'{name}' ({type(module).__name__})" if name else type(module).__name__
