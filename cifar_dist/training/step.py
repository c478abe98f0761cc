"""One training step on the device: forward, backward, optimizer."""

import functools
from contextlib import nullcontext
from dataclasses import dataclass

from torch import nn

from cifar_dist.config.plan import RunPlan
from cifar_dist.config.recipe import Recipe
from cifar_dist.data.loader import Batch
from cifar_dist.data.sampler import derive_seed
from cifar_dist.model.optimizer import set_learning_rate
from cifar_dist.model.schedule import learning_rate
from cifar_dist.model.stochastic import HeadDropout
from cifar_dist.runtime.distributed import Runtime
from cifar_dist.training.cuda_graphs import CudaGraphStep
from cifar_dist.training.evaluation import batch_loss
from cifar_dist.training.state import TrainState


@dataclass(kw_only=True, eq=False, repr=False)
class TrainingStep:
    """Update the weights of a state by a batch.

    Python values are frozen at the capture of a CUDA graph. So whatever varies (learning rate, step number, dropout's
    key) is written into tensors before `_forward_backward`.
    """

    recipe: Recipe
    plan: RunPlan
    runtime: Runtime
    state: TrainState
    frozen: tuple[nn.Parameter, ...] = ()
    """Parameters that the first `freeze_epochs` do not train."""
    dropout: HeadDropout | None = None
    cuda_graph: CudaGraphStep | None = None
    """None: each step is launched operation by operation."""

    def __post_init__(self) -> None:
        self.model, self.optimizer = self.runtime.prepare(self.state.model, self.state.optimizer)

    def begin_epoch(self, epoch: int) -> None:
        """Set training mode and the key of dropout."""
        self.model.train()
        if self.dropout is not None:
            self.dropout.set_key(derive_seed("dropout", self.recipe.seed, epoch))

    def train_on(self, batch: Batch, *, is_frozen: bool = False) -> None:
        """Add the gradient of a micro-batch. After the last one of a step, update the weights."""
        step = self.state.step
        set_learning_rate(self.optimizer, learning_rate(self.recipe, self.plan, step))
        self.state.sums.at_step(step + 1)
        run = functools.partial(self._forward_backward, is_frozen=is_frozen)
        if self.cuda_graph is None or batch.images_in_step < self.plan.global_batch_size:
            run(batch)
        else:
            self.cuda_graph.run(run, batch, kind=is_frozen)

    def _forward_backward(self, batch: Batch, *, is_frozen: bool) -> None:
        if self.dropout is not None:
            self.dropout.set_samples(batch.samples)
        if self.state.groups is not None:
            self.state.groups.images = batch.images_together
        accelerator = self.runtime.accelerator
        with nullcontext() if batch.ends_step else accelerator.no_sync(self.model):
            logits = self.model(batch.images)
            loss = batch_loss(logits, batch, self.recipe.label_smoothing)
            # DDP averages over the ranks, whose shares may differ in size.
            accelerator.backward(loss * (self.plan.world_size / batch.images_in_step))
        self.state.sums.add(loss.detach(), logits, batch.labels)
        if batch.ends_step:
            for parameter in self.frozen if is_frozen else ():
                parameter.grad = None  # neither a step, nor momentum, nor weight decay
            if self.recipe.gradient_clipping is not None:
                accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_clipping)
            self.optimizer.step()
            self.optimizer.zero_grad()
