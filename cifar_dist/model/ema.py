"""An exponential moving average of the weights, which is validated, selected and tested in their place."""

import copy

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """A second model whose weights follow the trained ones.

    After step t (from 1) the decay is min(decay, (1 + t) / (10 + t)), so that the first weights are soon forgotten
    (TensorFlow's ExponentialMovingAverage). BatchNorm's running statistics are averaged too, counters are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Average in the model's weights after a step."""
        averages, values = list[Tensor](), list[Tensor]()
        for average, value in zip(_tensors(self.model), _tensors(model), strict=True):
            if average.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, values, 1 - min(self.decay, (1 + step) / (10 + step)))


def _tensors(model: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
