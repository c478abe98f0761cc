"""An exponential moving average of the weights, which is validated, selected and tested in their place."""

import copy

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Keeps a second model whose weights follow those that are trained.

    After step t (from 1) the decay is min(decay, (1 + t) / (10 + t)), so that the first weights are soon forgotten
    (TensorFlow's ExponentialMovingAverage). BatchNorm's running statistics are averaged likewise, counters are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the model's weights after a step."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        averages: list[Tensor] = []
        values: list[Tensor] = []
        for average, value in zip(self._tensors(self.model), self._tensors(model), strict=True):
            if average.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        with torch.no_grad():
            torch._foreach_lerp_(averages, values, weight)

    @staticmethod
    def _tensors(model: nn.Module) -> list[Tensor]:
        return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
