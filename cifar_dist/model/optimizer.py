"""The optimiser of a recipe, with its weight decay where the recipe wants it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cifar_dist.config.recipe import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, fused: bool | None = None) -> torch.optim.Optimizer:
    """Build SGD, AdamW (`momentum` is its first beta) or Muon over the model's parameters.

    `fused` is one kernel over all parameters instead of several passes; None: where the device has it.

    Without `decay_norm_and_bias` only matrices and filters decay: BatchNorm's scales and the biases have one
    dimension and go in a group of their own.
    """
    filters = [each for each in model.parameters() if each.ndim == 4] if config.name == "muon" else []
    taken = {id(each) for each in filters}
    members: dict[bool, list[nn.Parameter]] = {}
    for each in model.parameters():
        if id(each) not in taken:
            members.setdefault(config.decay_norm_and_bias or each.ndim > 1, []).append(each)
    groups: list[dict[str, Any]] = [
        {"params": each, "weight_decay": config.weight_decay if decays else 0.0} for decays, each in members.items()
    ]
    if fused is None and next(model.parameters()).device.type in ("cpu", "cuda"):  # MPS keeps torch's own choice
        fused = True
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.momentum, 0.999), fused=fused)
    options: dict[str, Any] = {"lr": config.learning_rate, "momentum": config.momentum, "nesterov": config.nesterov}
    if config.name == "muon":
        return MuonWithSGD(filters, groups, weight_decay=config.weight_decay, fused=fused, **options)
    return _with_momentum(torch.optim.SGD(groups, fused=fused, **options))


def _with_momentum(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """Start SGD's momentum at 0, which changes nothing but two accidents of torch's fused kernel.

    It makes the buffer in its first step without filling it, and where the fp16 scaler skips that step, what was in the
    memory stays; and it fails on a group in which some have a buffer already and others, frozen so far, have none.
    """
    for group in optimizer.param_groups:
        if group["momentum"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group of parameters this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class MuonWithSGD(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon/) for the filters, SGD for everything else.

    torch's Muon takes matrices: each filter (out, in, h, w) is shown to it as (out, in * h * w), sharing its memory.
    """

    def __init__(
        self,
        filters: list[nn.Parameter],
        groups: list[dict[str, Any]],
        *,
        weight_decay: float,
        fused: bool | None,
        **options: Any,
    ) -> None:
        self.filters = filters
        self.matrices = [nn.Parameter(_matrix(each.detach())) for each in filters]
        self.muon = torch.optim.Muon(self.matrices, weight_decay=weight_decay, **options)
        self.sgd = _with_momentum(torch.optim.SGD(groups, fused=fused, **options))
        super().__init__([{"params": filters}, *self.sgd.param_groups], {"lr": options["lr"]})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step both, at the learning rates that this optimiser's groups have."""
        assert closure is None
        for matrix, each in zip(self.matrices, self.filters, strict=True):
            matrix.grad = None if each.grad is None else _matrix(each.grad)
        set_learning_rate(self.muon, self.param_groups[0]["lr"])
        for mine, theirs in zip(self.param_groups[1:], self.sgd.param_groups, strict=True):
            theirs["lr"] = mine["lr"]
        self.muon.step()  # type: ignore[no-untyped-call]
        self.sgd.step()

    def state_dict(self) -> dict[str, Any]:
        """Give both states."""
        return {"muon": self.muon.state_dict(), "sgd": self.sgd.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take both states back."""
        self.muon.load_state_dict(state_dict["muon"])
        self.sgd.load_state_dict(state_dict["sgd"])


def _matrix(filters: Tensor) -> Tensor:
    """Show (out, in, h, w) as (out, in * h * w) in the order in which it lies in memory, without a copy."""
    if not filters.is_contiguous() and filters.is_contiguous(memory_format=torch.channels_last):
        filters = filters.permute(0, 2, 3, 1)
    return filters.reshape(len(filters), -1)
