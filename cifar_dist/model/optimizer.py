"""Update the weights: SGD, AdamW and Muon, the learning rate, and the exponential moving average."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cifar_dist.config.errors import UserError
from cifar_dist.config.plan import RunPlan
from cifar_dist.config.recipe import OptimizerConfig, Recipe


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    head: tuple[str, nn.Module] | None = None,
    *,
    fused: bool | None = None,
    precision: str = "no",
) -> torch.optim.Optimizer:
    """Build SGD, AdamW (`momentum` is its first beta) or Muon over the model's trainable parameters.

    Muon steps `matrices_of` the model, of which `head` is the last layer. `fused` is one kernel over all parameters;
    None: if the device has it. With `precision` bf16, up to three Newton-Schulz steps are computed in bfloat16. Without
    `decay_norm_and_bias` only matrices and filters decay: BatchNorm's scales and the biases have one dimension and a
    group of their own. A group with `head_learning_rate` or `bias_learning_rate` decays as fast as the others: its
    weight decay is divided by the ratio of the rates.
    """
    is_muon = config.name == "muon"
    trainable = [each for each in model.parameters() if each.requires_grad]
    matrices = matrices_of(model, head) if is_muon else []
    is_matrix, in_head = set(map(id, matrices)), set() if head is None else set(map(id, head[1].parameters()))
    members: dict[tuple[bool, float | None], list[nn.Parameter]] = {}
    for each in trainable:
        if id(each) not in is_matrix:
            own = config.head_learning_rate if id(each) in in_head else None
            own = config.bias_learning_rate if own is None and each.ndim == 1 else own
            members.setdefault((config.decay_norm_and_bias or each.ndim > 1, own), []).append(each)
    if not members:
        raise UserError("muon needs a parameter that it leaves to SGD, such as a bias: set optimizer.name=sgd")
    other = (config.sgd_learning_rate if is_muon else None) or config.learning_rate
    groups: list[dict[str, Any]] = [
        {
            "params": each,
            "weight_decay": config.weight_decay * (other / (own or other)) if decays else 0.0,
            "lr_scale": (own or other) / config.learning_rate,
        }
        for (decays, own), each in members.items()
    ]
    kind = trainable[0].device.type
    if fused is None and kind in ("cpu", "cuda"):  # MPS keeps torch's own choice
        fused = True
    if config.name == "adamw":
        how: dict[str, Any] = {"fused": fused, "capturable": kind == "cuda"}  # for CUDA graphs
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.momentum, 0.999), **how)
    options: dict[str, Any] = {"lr": config.learning_rate, "momentum": config.momentum, "nesterov": config.nesterov}
    if is_muon:
        own_options: dict[str, Any] = {"weight_decay": config.weight_decay, "normalized": config.normalize_filters}
        in_bf16 = precision == "bf16" and config.orthogonalization_steps <= _BF16_STEPS
        own_options |= {"steps": config.orthogonalization_steps, "dtype": torch.bfloat16 if in_bf16 else None}
        momentum = config.momentum if config.sgd_momentum is None else config.sgd_momentum
        return MuonWithSGD(matrices, own_options | options, groups, options | {"momentum": momentum, "fused": fused})
    return _with_momentum(torch.optim.SGD(groups, fused=fused, **options))


def matrices_of(model: nn.Module, head: tuple[str, nn.Module] | None) -> list[nn.Parameter]:
    """Return the trainable parameters that Muon steps: filter banks and the matrices of hidden layers.

    Not the head, embeddings and tables of positions, as in Muon's post. Not depthwise filters: their rows are separate
    filters of one channel each, between which orthogonality means nothing.
    """
    others = set() if head is None else {id(each) for each in head[1].parameters()}
    for module in model.modules():
        if isinstance(module, nn.Embedding) or (isinstance(module, nn.Conv2d) and module.weight.shape[1] == 1):
            others.add(id(module.weight))
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad and id(each) not in others]
    return [each for name, each in named if each.ndim in (2, 4) and "position" not in name]


def _with_momentum(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """Start SGD's momentum at 0, which works around two bugs of the fused kernel.

    It does not fill the buffer of a first step that the fp16 scaler skips. It fails on a group in which only some
    parameters have a buffer, as after freezing.
    """
    for group in optimizer.param_groups:
        if group["momentum"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load a state that was saved on any device; this device's kernel and memory layout stay."""
    if isinstance(optimizer, MuonWithSGD):
        optimizer.load_state_dict(dict(saved))
        return
    own = [{name: mine[name] for name in ("fused", "capturable") if name in mine} for mine in optimizer.param_groups]
    own_kernel = [group | kernel for group, kernel in zip(saved["param_groups"], own, strict=True)]
    optimizer.load_state_dict({**saved, "param_groups": own_kernel})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every parameter group's learning rate to `rate` times the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


class MuonWithSGD(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon/) for `matrices_of` the model, SGD for everything else.

    A filter bank (out, in, h, w) is a matrix (out, in * h * w). Its step is the momentum's nearest orthogonal matrix,
    times the learning rate and sqrt(max(1, rows / columns)). (torch.optim.Muon accepts matrices only, and
    orthogonalizes in bfloat16, which many CPUs emulate.)
    """

    def __init__(
        self,
        filters: list[nn.Parameter],
        options: dict[str, Any],
        groups: list[dict[str, Any]],
        sgd_options: dict[str, Any],
    ) -> None:
        """`options` of Muon: lr, momentum, nesterov, weight_decay, normalized, steps, dtype."""
        self.sgd = _with_momentum(torch.optim.SGD(groups, **sgd_options))
        super().__init__([{"params": filters, **options}, *self.sgd.param_groups], {})
        for each in filters:
            self.state[each]["momentum_buffer"] = torch.zeros_like(each)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step both optimizers at the learning rates of this one's groups."""
        assert closure is None
        self.sgd.step()
        if filters := [each for each in self.param_groups[0]["params"] if each.grad is not None]:
            self._step_filters(filters)

    def _step_filters(self, filters: list[nn.Parameter]) -> None:
        options = self.param_groups[0]
        weights = [_matrix(each.detach()) for each in filters]
        gradients = [_matrix(each.grad) for each in filters if each.grad is not None]
        momenta = [_matrix(self.state[each]["momentum_buffer"]) for each in filters]
        torch._foreach_mul_(momenta, options["momentum"])
        torch._foreach_add_(momenta, gradients)
        ahead = torch._foreach_add(gradients, momenta, alpha=options["momentum"]) if options["nesterov"] else momenta
        directions = orthogonalized(ahead, options["steps"], options["dtype"])
        if options["normalized"]:
            lengths = torch._foreach_norm(weights)
            torch._foreach_reciprocal_(lengths)
            torch._foreach_mul_(lengths, [math.sqrt(len(each)) for each in weights])
            torch._foreach_mul_(weights, lengths)
        torch._foreach_mul_(weights, 1 - options["lr"] * options["weight_decay"])
        ratios = [rows / columns for rows, columns in (each.shape for each in weights)]
        torch._foreach_mul_(directions, [-math.sqrt(max(1, ratio)) for ratio in ratios])
        torch._foreach_mul_(directions, options["lr"])  # a number, or a tensor while a CUDA graph is captured
        torch._foreach_add_(weights, directions)

    def state_dict(self) -> dict[str, Any]:
        """Return both states."""
        momenta = [self.state[each]["momentum_buffer"] for each in self.param_groups[0]["params"]]
        return {"muon": momenta, "sgd": self.sgd.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load both states."""
        for each, momentum in zip(self.param_groups[0]["params"], state_dict["muon"], strict=True):
            self.state[each]["momentum_buffer"].copy_(momentum)
        load_optimizer_state(self.sgd, state_dict["sgd"])
        self.param_groups[1:] = self.sgd.param_groups  # loading replaces them; both must see one learning rate


_BF16_STEPS = 3
"""The most Newton-Schulz steps in bfloat16: the error is up to 1.5 % after 3, and 20 % after 5."""


def orthogonalized(matrices: Sequence[Tensor], steps: int = 5, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return, approximately, the nearest orthogonal matrix of each of (rows, columns): U V' for U S V'.

    Muon's Newton-Schulz steps X <- (a + b G + c G G) X with G = X X' bring the singular values near 1. On CUDA in TF32
    if the convolutions are, and then in two stages: TF32's 11 bits lose the squares of small singular values, and that
    error grows with each step, up to twelve times. A restart from X after three steps stops it. Elsewhere the products
    are computed in `dtype`, by default that of the matrices.
    """
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    if not (matrices[0].is_cuda and convolutions.fp32_precision == "tf32"):
        rounded = [each.to(dtype) for each in matrices]
        return [each.to(matrices[0].dtype) for each in _newton_schulz(rounded, steps)]
    before, products.fp32_precision = products.fp32_precision, "tf32"
    try:
        return _newton_schulz_in_stages(matrices, steps)
    finally:
        products.fp32_precision = before


def _newton_schulz_in_stages(matrices: Sequence[Tensor], steps: int) -> list[Tensor]:
    first = _newton_schulz(matrices, min(steps, 3), least_side=128)
    return _newton_schulz(first, steps - 3, scales=False, least_side=128) if steps > 3 else first


def _newton_schulz(matrices: Sequence[Tensor], steps: int, *, scales: bool = True, least_side: int = 0) -> list[Tensor]:
    """Run the steps; `scales` first brings the singular values below 1.

    Each step multiplies X by a polynomial of G. These small square polynomials are multiplied with each other first, in
    one batch for all matrices of one size, and X only once, at the end: a third of the work for a ResNet-18's largest
    filters. That squares the singular values, for which bfloat16 is too coarse after three steps. A tall matrix uses
    G = X'X from the right. Smaller matrices than `least_side` are padded with zeros: on a GPU the number of products
    is the cost.
    """
    grams = [each.mT @ each if len(each) > each.shape[1] else each @ each.mT for each in matrices]
    alike: dict[int, list[int]] = {}
    for place, gram in enumerate(grams):
        alike.setdefault(max(len(gram), least_side), []).append(place)
    factors = list(grams)
    for side, places in alike.items():
        missing = [side - len(grams[place]) for place in places]
        stack = torch.stack([functional.pad(grams[p], (0, m, 0, m)) for p, m in zip(places, missing, strict=True)])
        for place, factor in zip(places, _product_of_factors(stack, steps, scales=scales), strict=True):
            factors[place] = factor[: len(grams[place]), : len(grams[place])]
    return [
        each @ factor if len(each) > each.shape[1] else factor @ each
        for each, factor in zip(matrices, factors, strict=True)
    ]


def _product_of_factors(gram: Tensor, steps: int, *, scales: bool) -> Tensor:
    """Return the product of the steps' factors for G (k, side, side)."""
    length = gram.diagonal(dim1=1, dim2=2).sum(1).sqrt_().add_(1e-7)[:, None, None]  # of X: G's trace is its square
    if scales:
        gram = gram / length.square()
    product = factor = _newton_schulz_factor(gram)
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = _newton_schulz_factor(gram)
        product = factor @ product
    return product / length if scales else product


def _newton_schulz_factor(gram: Tensor) -> Tensor:
    first, second, third = 3.4445, -4.7750, 2.0315  # Muon's, chosen for a steep rise at 0
    factor = torch.baddbmm(second * gram, gram, gram, beta=1, alpha=third)
    factor.diagonal(dim1=1, dim2=2).add_(first)
    return factor


def _matrix(filters: Tensor) -> Tensor:
    """View (out, in, h, w) as (out, in * h * w) in memory order, without a copy; a matrix is itself."""
    if filters.ndim == 4 and not filters.is_contiguous() and filters.is_contiguous(memory_format=torch.channels_last):
        filters = filters.permute(0, 2, 3, 1)
    return filters.reshape(len(filters), -1)


def learning_rate(recipe: Recipe, plan: RunPlan, step: int) -> float:
    """Return the learning rate of a step, counted from 0: peak x warm-up x the schedule's factor.

    Warm-up rises linearly to 1 at the last of its steps. Then, with p the fraction of the remaining steps that is done:
    `constant` is 1, `cosine` (1 + cos(pi p)) / 2 (arXiv 1608.03983, without restarts), `triangular` 1 - p, and `step`
    gamma to the number of whole `step_epochs` since the start of the run.
    """
    schedule = recipe.schedule
    warmup_steps = round(schedule.warmup_fraction * plan.total_steps)
    if step < warmup_steps:
        return recipe.optimizer.learning_rate * (step + 1) / warmup_steps
    part = (step - warmup_steps) / max(plan.total_steps - warmup_steps, 1)
    factor = 1.0
    if schedule.name == "cosine":
        factor = (1 + math.cos(math.pi * part)) / 2
    elif schedule.name == "triangular":
        factor = 1 - part
    elif schedule.name == "step":
        assert schedule.step_epochs is not None and schedule.gamma is not None
        factor = schedule.gamma ** (step // (schedule.step_epochs * plan.steps_per_epoch))
    return recipe.optimizer.learning_rate * factor


def learning_rate_line(recipe: Recipe, plan: RunPlan) -> str:
    """Describe the learning rate at the start, at its peak and at the end."""
    last = plan.total_steps - 1
    peak = round(recipe.schedule.warmup_fraction * plan.total_steps) - 1
    parts = [f"{learning_rate(recipe, plan, 0):.4g} at the start"]
    if 0 < peak < last:
        parts.append(f"{learning_rate(recipe, plan, peak):.4g} at its peak (step {peak + 1:,})")
    return f"{recipe.schedule.name}, {', '.join(parts)}, {learning_rate(recipe, plan, last):.4g} at the end"


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
