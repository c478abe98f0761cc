"""Changes of a training that no recipe field makes: a row of a programme may name one as `change`.

Each is a context manager that changes the package while a run trains. What a change gains shows in docs/accuracy.md.
A checkpoint does not have the change's own state, so a run that was stopped and resumed is another one.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional

from cifar_dist.data.loader import Batch
from cifar_dist.model import optimizer
from cifar_dist.model.layers import running_statistics
from cifar_dist.training.step import TrainingStep

_POLAR_EXPRESS = ((8.28721201814563, -23.595886519098837, 17.300387312530933),
                  (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                  (3.9486908534822946, -2.908902115962949, 0.5518191394370137))  # fmt: skip
"""Polynomials of the first steps for singular values from 1e-3 to 1 (arXiv 2505.16932, algorithm 1)."""
_SAFETY = 1.01
"""Likewise: the factor that keeps rounded singular values in the range of the next polynomial."""


@contextmanager
def selective_backpropagation() -> Iterator[None]:
    """Train on the half of each batch with the largest loss (arXiv 1910.00762); all of it is in the statistics."""
    train = TrainingStep._forward_backward_step

    def train_on_half(self: TrainingStep, batch: Batch) -> None:
        with torch.no_grad():
            losses = functional.cross_entropy(self.forward(batch), batch.labels, reduction="none")
        statistics = running_statistics(self.state.model)
        of_all = [each.clone() for each in statistics]
        hardest = losses.topk(len(losses) // 2).indices
        parts = {name: getattr(batch, name)[hardest] for name in ("images", "labels", "samples")}
        train(self, replace(batch, **parts, images_in_step=len(hardest)))
        for tensor, before in zip(statistics, of_all, strict=True):
            tensor.copy_(before)

    with patch.object(TrainingStep, "_forward_backward_step", train_on_half):
        yield


@contextmanager
def lookahead() -> Iterator[None]:
    """Average the weights with slow ones every five steps (arXiv 1907.08610), at the rate of arXiv 2404.00498."""
    train = TrainingStep.train_on

    def train_and_average(self: TrainingStep, batch: Batch) -> None:
        weights = [each for each in self.state.model.state_dict().values() if each.is_floating_point()]
        if self.state.step == 0:
            vars(self)["slow"] = [each.clone() for each in weights]
        train(self, batch)
        done = self.state.step + 1
        if done % 5 == 0:
            kept = 0.95**5 * (done / self.plan.total_steps) ** 3
            for slow, fast in zip(vars(self)["slow"], weights, strict=True):
                slow.lerp_(fast, 1 - kept)
                fast.copy_(slow)

    with patch.object(TrainingStep, "train_on", train_and_average):
        yield


def _first_block_frozen(is_frozen: Callable[[float], bool]) -> Callable[[], AbstractContextManager[None]]:
    """Return the change that trains neither FastNet's first block nor the bias before it in some of the epochs.

    `is_frozen` is called with the part of the training that is done at the end of an epoch, from 0 to 1.
    """

    @contextmanager
    def freeze() -> Iterator[None]:
        begin = TrainingStep.begin_epoch

        def begin_epoch(self: TrainingStep, epoch: int) -> None:
            begin(self, epoch)
            network: Any = self.state.model
            first = (network.whitening.bias, *network.blocks[0].parameters())
            # Not the scales of BatchNorm, which the recipe itself does not train.
            for each in vars(self).setdefault("first", [each for each in first if each.requires_grad]):
                each.requires_grad_(not is_frozen(epoch / self.recipe.epochs))

        with patch.object(TrainingStep, "begin_epoch", begin_epoch):
            yield

    return freeze


@contextmanager
def orthogonalize_every_second_step() -> Iterator[None]:
    """Step Muon's filters every second time, by twice the rate; the momentum takes each gradient."""
    step_filters = optimizer.MuonWithSGD._step_filters

    def step_or_wait(self: optimizer.MuonWithSGD, filters: list[nn.Parameter]) -> None:
        count = vars(self)["count"] = vars(self).get("count", 0) + 1
        group = self.param_groups[0]
        rate = group["lr"]
        group["lr"] = 2 * rate if count % 2 == 0 else 0.0
        step_filters(self, filters)
        group["lr"] = rate

    with patch.object(optimizer.MuonWithSGD, "_step_filters", step_or_wait):
        yield


@contextmanager
def polar_express() -> Iterator[None]:
    """Use the polynomials of "Polar Express" (arXiv 2505.16932) in place of Muon's, in up to three steps."""
    product, place = optimizer._product_of_factors, 0

    def begin(gram: Tensor, steps: int, *, scales: bool) -> Tensor:
        nonlocal place
        place = 0
        return product(gram, steps, scales=scales)

    def factor_of(gram: Tensor) -> Tensor:
        nonlocal place
        first, second, third = (
            each / _SAFETY**power for each, power in zip(_POLAR_EXPRESS[place], (1, 3, 5), strict=True)
        )
        place += 1
        factor = torch.baddbmm(second * gram, gram, gram, beta=1, alpha=third)
        factor.diagonal(dim1=1, dim2=2).add_(first)
        return factor

    with (
        patch.object(optimizer, "_product_of_factors", begin),
        patch.object(optimizer, "_newton_schulz_factor", factor_of),
    ):
        yield


CHANGES: dict[str | None, Callable[[], AbstractContextManager[None]]] = {
    None: nullcontext,
    "selective backpropagation": selective_backpropagation,
    "lookahead": lookahead,
    "first block frozen at first": _first_block_frozen(lambda done: done < 0.34),
    "first block frozen at last": _first_block_frozen(lambda done: done > 0.67),
    "orthogonalize every second step": orthogonalize_every_second_step,
    "Polar Express": polar_express,
}
"""By the name in a programme's row."""
