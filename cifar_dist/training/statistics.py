"""BatchNorm's running statistics, where each rank has some of its own: with ghost groups."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cifar_dist.model.batch_norm import Groups, running_statistics
from cifar_dist.runtime.distributed import Runtime
from cifar_dist.training.state import TrainState


class OwnStatistics:
    """The running means and variances that follow a rank's own groups; none without groups."""

    def __init__(self, state: TrainState, runtime: Runtime, groups: Groups | None) -> None:
        self.state = state
        self.runtime = runtime
        self.groups = groups

    def even_out(self) -> None:
        """Make them equal on all ranks, as an evaluation and a checkpoint want them."""
        self.runtime.average_over_ranks(self._tensors())

    def read(self) -> list[float]:
        """Give this rank's, for a run that goes on with the same bits."""
        return [value for tensor in self._tensors() for value in tensor.tolist()]

    def take(self, values: Sequence[float]) -> None:
        """Take what `read` gave."""
        tensors = self._tensors()
        if values and tensors:
            parts = torch.split(torch.tensor(values, dtype=torch.float64), [len(tensor) for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part)

    def _tensors(self) -> list[Tensor]:
        if self.groups is None:
            return []
        models = [self.state.model] if self.state.ema is None else [self.state.model, self.state.ema.model]
        return running_statistics(*models)
