"""BatchNorm whose statistics do not depend on how many processes share a batch.

Over the whole batch (torch.nn.SyncBatchNorm on CUDA, our own layer on the CPU, where torch has none), or over ghost
groups (arXiv 1705.08741) that lie whole on one process each. State dicts keep torch.nn.BatchNorm2d's keys.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.modules._functions import SyncBatchNorm as SyncBatchNormFunction


@dataclass(kw_only=True, eq=False)
class Groups:
    """How the images that are forwarded together are cut into groups with statistics of their own.

    Group g holds positions g, g + count, g + 2 count, … of them. Rank r of R holds positions r, r + R, …, so that where
    R divides `count`, each rank holds whole groups, and a group is every (count / R)-th of its images.
    """

    count: int
    """Of all ranks together."""
    num_ranks: int
    images: int = 0
    """Images forwarded together, by all ranks: to be set before each forward pass."""

    @property
    def own(self) -> int:
        """Groups on each rank; 0 where the images are so few that they are one group over all ranks."""
        return self.count // self.num_ranks if self.images >= 2 * self.count else 0


def share_statistics(model: nn.Module, *, num_ranks: int) -> nn.Module:
    """Make every BatchNorm of the model take its statistics over the batch of all ranks; give the model.

    With one rank nothing changes.
    """
    if num_ranks == 1:
        return model
    if next(model.parameters()).device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        for layer in model.modules():
            if isinstance(layer, nn.SyncBatchNorm):
                layer.register_forward_pre_hook(lambda _, inputs: (_without_emptiness(inputs[0]),))
        return model
    return _replace(model, lambda norm: GlobalBatchNorm2d(norm.num_features, norm.eps, norm.momentum))


def use_groups(model: nn.Module, groups: Groups) -> nn.Module:
    """Make every BatchNorm of the model take its statistics over the groups; give the model.

    Each rank's running statistics then follow its own groups: `running_statistics` are to be averaged over the ranks
    before they are used.
    """
    return _replace(model, lambda norm: GhostBatchNorm2d(norm, groups))


def running_statistics(*models: nn.Module) -> list[Tensor]:
    """Give the running means and variances of all BatchNorm layers."""
    layers = [layer for model in models for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    return [tensor for layer in layers for tensor in (layer.running_mean, layer.running_var) if tensor is not None]


def _replace(model: nn.Module, make: Any) -> nn.Module:
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                layer: nn.BatchNorm2d = make(norm)
                # The same tensors and not copies: an optimiser may know them already.
                layer._parameters, layer._buffers = norm._parameters, norm._buffers
                setattr(parent, name, layer.train(norm.training))
    return model


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the images (N, C, H, W) of all ranks, each of which may have any number of them, also none."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise by the batch's statistics in training, by the running ones in evaluation."""
        if not self.training:
            return super().forward(input)
        return _normalize_globally(self, input)


class GhostBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over groups of the batch, without a collective; the running statistics are the mean over the groups."""

    def __init__(self, norm: nn.BatchNorm2d, groups: Groups) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.groups = groups

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each group by its statistics in training, all by the running ones in evaluation."""
        own = self.groups.own
        if not self.training or own == 1 or (own == 0 and self.groups.num_ranks == 1):
            return super().forward(input)
        if own == 0:
            return _normalize_globally(self, input)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        means, variances = (self.running_mean.new_zeros(own, self.num_features) for _ in range(2))
        output = torch.empty_like(input)
        for g, (mean, variance) in enumerate(zip(means, variances, strict=True)):
            part = input[g::own]
            output[g::own] = functional.batch_norm(part, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
        assert self.momentum is not None
        self.running_mean.lerp_(means.mean(0), self.momentum)
        self.running_var.lerp_(variances.mean(0), self.momentum)
        return output


def _normalize_globally(layer: nn.BatchNorm2d, images: Tensor) -> Tensor:
    """Normalise by statistics over all ranks, and let the layer's running statistics follow them."""
    assert layer.running_mean is not None and layer.running_var is not None and layer.num_batches_tracked is not None
    layer.num_batches_tracked.add_(1)
    assert layer.momentum is not None
    momentum = layer.momentum
    if images.device.type == "cuda":
        group = distributed.group.WORLD
        running, ranks = (layer.running_mean, layer.running_var), distributed.get_world_size()
        output: Tensor = SyncBatchNormFunction.apply(
            _without_emptiness(images), layer.weight, layer.bias, *running, layer.eps, momentum, group, ranks
        )
        return output
    output, mean, variance, count = _GlobalBatchNorm.apply(images, layer.weight, layer.bias, layer.eps)
    layer.running_mean.lerp_(mean, momentum)
    layer.running_var.lerp_(variance * (count / (count - 1)).to(variance.dtype), momentum)
    return output


def _without_emptiness(images: Tensor) -> Tensor:
    """Give an empty share in float32: in bf16 torch's SyncBatchNorm would gather it with the others' float32."""
    return images if images.numel() else images.float()


class _GlobalBatchNorm(torch.autograd.Function):
    """Normalisation by the mean and variance over all ranks: one all-reduce forwards, one backwards.

    Both passes use torch's kernels for the sums of a rank's own images, and its evaluation kernel, which is an affine
    map of each channel computed in float32, for everything that touches each pixel.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Give the output, and the mean, biased variance and number of values of a channel over all ranks."""
        channels, own_count = images.shape[1], images.numel() // images.shape[1]
        moments = torch.zeros(2 * channels + 1, dtype=torch.float64)
        if own_count:
            # The momentum is of no account: what it updates is thrown away. They only say in which type to compute.
            unused = torch.zeros_like(weight)
            mean, variance = (each.double() for each in torch.batch_norm_update_stats(images, unused, unused, 0.0))
            moments[0] = own_count
            moments[1 : channels + 1] = own_count * mean
            moments[channels + 1 :] = own_count * (variance + mean * mean)
        distributed.all_reduce(moments)
        count, sums = moments[0], moments[1:].view(2, channels) / moments[0]
        mean, variance = sums[0].to(weight.dtype), (sums[1] - sums[0] ** 2).clamp_(min=0).to(weight.dtype)
        output = functional.batch_norm(images, mean, variance, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(images, weight, mean, (variance + eps).rsqrt())
        ctx.count, ctx.eps = count, eps
        ctx.mark_non_differentiable(mean, variance, count)
        return output, mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Give the gradients of the images, and of weight and bias by this rank's images alone: DDP adds those up."""
        images, weight, mean, inverse_std = ctx.saved_tensors
        channels = images.shape[1]
        own_weight, own_bias = torch.zeros_like(weight), torch.zeros_like(weight)
        if images.numel():
            grad = (
                grad.contiguous(memory_format=torch.channels_last) if _is_channels_last(images) else grad.contiguous()
            )
            _, own_weight, own_bias = torch.ops.aten.native_batch_norm_backward(
                grad, images, weight, None, None, mean, inverse_std, True, ctx.eps, [False, True, True]
            )
        sums = torch.cat([own_bias, own_weight]).double()
        distributed.all_reduce(sums)
        of_bias, of_weight = (sums / ctx.count).to(weight.dtype).view(2, channels)
        # d images = scale (grad - mean of grad - normalised images x mean of (grad x normalised images))
        scale = weight * inverse_std
        one, zero = torch.ones_like(scale), torch.zeros_like(scale)
        result = _affine(grad, zero, one, scale, -scale * of_bias)
        slope = -scale * of_weight * inverse_std
        result += _affine(images, mean, one, slope, zero)
        return result, own_weight, own_bias, None


def _affine(images: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Map each channel by BatchNorm's evaluation kernel; torch 2.11's `functional.batch_norm` refuses an eps of 0."""
    return torch.batch_norm(images, weight, bias, mean, variance, False, 0.0, 0.0, False)


def _is_channels_last(images: Tensor) -> bool:
    return images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
