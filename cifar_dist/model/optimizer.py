"""The optimiser of a recipe, with its weight decay where the recipe wants it."""

import torch
from torch import nn

from cifar_dist.config.recipe import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build SGD with momentum over the model's parameters.

    Without `decay_norm_and_bias` only matrices and filters decay: BatchNorm's scales and the biases have one
    dimension and go in a group of their own.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [each for each in parameters if config.decay_norm_and_bias or each.ndim > 1]
    kept = [each for each in parameters if not (config.decay_norm_and_bias or each.ndim > 1)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        # One kernel over all parameters instead of several passes; MPS keeps torch's own choice.
        fused=True if parameters[0].device.type in ("cpu", "cuda") else None,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group of parameters this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
