"""A training step: what a device has to do with a batch."""

import functools
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
from cifar_dist.training.metrics import batch_loss
from cifar_dist.training.state import TrainState


@dataclass(kw_only=True, eq=False, repr=False)
class TrainingStep:
    """Changes a state's weights by a batch; it counts nothing and decides nothing.

    What changes from one step to the next (learning rate, number of the step, dropout's key) is set before `_work`,
    which may be replayed (`CudaGraphStep`) and then has all of Python's values as they were.
    """

    recipe: Recipe
    plan: RunPlan
    runtime: Runtime
    state: TrainState
    frozen: tuple[nn.Parameter, ...] = ()
    """The parameters that stay as they are in the first `freeze_epochs`."""
    dropout: HeadDropout | None = None
    cuda_graph: CudaGraphStep | None = None
    """None: each step is launched operation by operation."""

    def __post_init__(self) -> None:
        self.model, self.optimizer = self.runtime.prepare(self.state.model, self.state.optimizer)

    def begin_epoch(self, epoch: int) -> None:
        """Get ready to train in an epoch."""
        self.model.train()
        if self.dropout is not None:
            self.dropout.set_key(derive_seed("dropout", self.recipe.seed, epoch))

    def train_on(self, batch: Batch, *, is_frozen: bool = False) -> None:
        """Add a micro-batch's gradient and sums, and after the last one of a step do the step."""
        step = self.state.step
        set_learning_rate(self.optimizer, learning_rate(self.recipe, self.plan, step))
        self.state.sums.at_step(step + 1)
        work = functools.partial(self._work, is_frozen=is_frozen)
        if self.cuda_graph is None or batch.images_in_step < self.plan.global_batch_size:
            work(batch)
        else:
            self.cuda_graph.run(work, batch, kind=is_frozen)

    def _work(self, batch: Batch, *, is_frozen: bool) -> None:
        if self.dropout is not None:
            self.dropout.set_samples(batch.samples)
        if self.state.groups is not None:
            self.state.groups.images = batch.images_together
        with self.runtime.gradient_sync(self.model, batch.ends_step):
            logits = self.model(batch.images)
            loss = batch_loss(logits, batch, self.recipe.label_smoothing)
            # DDP averages over the ranks, which may have shares of different sizes.
            self.runtime.backward(loss * (self.plan.world_size / batch.images_in_step))
        self.state.sums.add(loss.detach(), logits, batch.labels)
        if batch.ends_step:
            self._optimizer_step(is_frozen=is_frozen)

    def _optimizer_step(self, *, is_frozen: bool) -> None:
        if is_frozen:
            for parameter in self.frozen:  # without a gradient it has neither a step, nor momentum, nor weight decay
                parameter.grad = None
        if self.recipe.gradient_clipping is not None:
            self.runtime.clip_gradients(self.model, self.recipe.gradient_clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()
