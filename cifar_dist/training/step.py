"""One training step on the device: forward, backward, optimizer; recorded as a CUDA graph if possible."""

import contextlib
import functools
import gc
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from cifar_dist.config.plan import RunPlan
from cifar_dist.config.recipe import Recipe
from cifar_dist.data.loader import Batch
from cifar_dist.data.sampler import derive_seed
from cifar_dist.model.optimizer import learning_rate, set_learning_rate
from cifar_dist.model.stochastic import Draws
from cifar_dist.runtime.distributed import Runtime
from cifar_dist.training.evaluation import batch_loss
from cifar_dist.training.state import TrainState

WARMUP_STEPS = 3
"""Eager steps before a capture: they select kernels and make the allocations that are made once."""

_NOTE = (
    "training steps are not replayed as CUDA graphs: one of them could not be captured ({reason}), because it makes the"
    " host wait for the GPU (.item(), .cpu(), a print) or the graph's memory does not fit"
)


def capture(work: Callable[[], object], *, pool: Any = None) -> Callable[[], object]:
    """Capture `work` on the current CUDA device without running it; return a function that replays it.

    Every replay uses the same memory: its results are lost with the next one, unless they are written to tensors that
    existed before. The graph does not keep those alive. Raises RuntimeError if `work` synchronizes with the host.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    was_enabled = gc.isenabled()
    gc.disable()  # an earlier graph that is destroyed during the capture would spoil it (pytorch#161037)
    try:
        with torch.cuda.graph(graph, pool=pool):
            work()
    except RuntimeError:
        # torch 2.14 stops at the first error of the capture's end, and leaves all that follows as it was.
        torch.cuda.set_stream(stream)
        graph.reset()
        if pool is not None:
            with contextlib.suppress(RuntimeError):  # the capture's end came as far as this
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
                torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        raise
    finally:
        if was_enabled:
            gc.enable()
    return graph.replay


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Graph:
    batch: Batch
    """Its tensors are the memory that the graph reads."""
    rates: tuple[Tensor, ...]
    """Likewise, the learning rate of each parameter group."""
    replay: Callable[[], object]


class CudaGraphStep:
    """Runs training steps by replaying CUDA graphs, one for each kind of step and image shape.

    Python values are frozen at capture. The batch and the learning rates are copied into the graph's own tensors;
    anything else that varies must be a tensor already. After a step that cannot be captured none is.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, note: Callable[[str], None]) -> None:
        """`note` is called with a line for the user if a capture fails."""
        self._optimizer, self._note = optimizer, note
        self._can_capture = True
        # Each trainer has its own pool: torch frees a pool with its last graph, and refuses it from then on.
        self._capture = functools.partial(capture, pool=torch.cuda.graph_pool_handle())
        self._num_eager: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, _Graph] = {}

    def run(self, work: Callable[[Batch], None], batch: Batch, *, kind: Hashable) -> None:
        """Run `work`, a whole step, on a batch. Steps of one `kind` and image shape must do the same operations."""
        key = (kind, batch.images.shape)
        graph = self._graphs.get(key)
        if graph is None and self._can_capture and self._num_eager[key] == WARMUP_STEPS:
            graph = self._capture_step(work, batch)
        if graph is None:
            self._num_eager[key] += 1
            work(batch)
            return
        self._graphs[key] = graph
        for own, tensor in zip(_tensors(graph.batch).values(), _tensors(batch).values(), strict=True):
            own.copy_(tensor)
        for rate, group in zip(graph.rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        graph.replay()

    def _capture_step(self, work: Callable[[Batch], None], batch: Batch) -> _Graph | None:
        """Capture a step without running it; None if that fails, which is noted."""
        copies: dict[str, Any] = {name: tensor.clone() for name, tensor in _tensors(batch).items()}
        own, groups = replace(batch, **copies), self._optimizer.param_groups
        rates = tuple(torch.zeros((), device=batch.images.device) for _ in groups)
        before = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        try:
            replay = self._capture(lambda: work(own))
        except RuntimeError as error:
            self._can_capture = False
            self._optimizer.zero_grad()  # of the pass that was not run
            cause = error.__context__ or error  # the capture's end fails, too
            self._note(_NOTE.format(reason=str(cause).partition("\n")[0]))
            return None
        finally:
            for group, number in zip(groups, before, strict=True):
                group["lr"] = number
        return _Graph(batch=own, rates=rates, replay=replay)


def _tensors(batch: Batch) -> dict[str, Tensor]:
    values = {each.name: getattr(batch, each.name) for each in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(kw_only=True, eq=False, repr=False)
class TrainingStep:
    """Update the weights of a state by a batch.

    Python values are frozen at the capture of a CUDA graph. So whatever varies (learning rate, step number, the masks'
    key) is written into tensors before `_forward_backward_step`.
    """

    recipe: Recipe
    plan: RunPlan
    runtime: Runtime
    state: TrainState
    frozen: Callable[[int], tuple[nn.Parameter, ...]] = lambda _: ()
    """Returns the parameters that an epoch does not train."""
    draws: Draws | None = None
    """What the masks of dropout depend on; None without dropout."""
    has_unused_parameters: bool = False
    """Whether trainable parameters take no part in the output."""
    cuda_graph: CudaGraphStep | None = None
    """None: each step is launched operation by operation."""

    def __post_init__(self) -> None:
        self._frozen: tuple[nn.Parameter, ...] = ()
        self.model, self.optimizer = self.runtime.prepare(
            self.state.model, self.state.optimizer, has_unused_parameters=self.has_unused_parameters
        )

    def begin_epoch(self, epoch: int) -> None:
        """Set training mode and the key of the random masks."""
        self.model.train()
        self._frozen = self.frozen(epoch)
        if self.draws is not None:
            self.draws.set_key(derive_seed("dropout", self.recipe.seed, epoch))

    def train_on(self, batch: Batch) -> None:
        """Set the learning rate, add a micro-batch's gradient, and after the last one of a step update the weights."""
        step = self.state.step
        set_learning_rate(self.optimizer, learning_rate(self.recipe, self.plan, step))
        self.state.sums.at_step(step + 1)
        if self.draws is not None:
            self.draws.set_step(step)
        if self.cuda_graph is None or batch.images_in_step < self.plan.global_batch_size:
            self._forward_backward_step(batch)
        else:
            self.cuda_graph.run(self._forward_backward_step, batch, kind=self._frozen)

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits (B, num_classes) of a micro-batch, in training mode."""
        if self.draws is not None:
            self.draws.begin(batch.samples)
        if self.state.groups is not None:
            self.state.groups.images = batch.images_together
        logits: Tensor = self.model(batch.images)
        return logits

    def _forward_backward_step(self, batch: Batch) -> None:
        accelerator = self.runtime.accelerator
        with contextlib.nullcontext() if batch.ends_step else accelerator.no_sync(self.model):
            logits = self.forward(batch)
            loss = batch_loss(logits, batch, self.recipe.label_smoothing)
            # DDP averages over the ranks, whose shares may differ in size.
            accelerator.backward(loss * (self.plan.world_size / batch.images_in_step))
        self.state.sums.add(loss.detach(), logits, batch.labels)
        if batch.ends_step:
            for parameter in self._frozen:
                parameter.grad = None  # neither a step, nor momentum, nor weight decay
            if self.recipe.gradient_clipping is not None:
                accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_clipping)
            self.optimizer.step()
            self.optimizer.zero_grad()
