"""BatchNorm whose statistics do not depend on the world size."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.modules._functions import SyncBatchNorm as SyncBatchNormFunction
from torch.nn.modules.batchnorm import _BatchNorm

from cifar_dist.config.errors import UserError


@dataclass(kw_only=True, eq=False)
class Groups:
    """How the images of a forward pass are divided into groups with separate statistics.

    Group g holds positions g, g + count, g + 2 count, ... Rank r of R holds positions r, r + R, ... If R divides
    `count`, each rank holds whole groups: every (count / R)-th of its images.
    """

    count: int
    """The number of groups over all ranks. 0: all images form one group."""
    num_ranks: int
    images: int = 0
    """Images forwarded together, by all ranks; set before each forward pass."""

    @property
    def own(self) -> int:
        """Groups on each rank; 0 if there is one group over all ranks, as with too few images for several."""
        return self.count // self.num_ranks if self.images >= 2 * self.count else 0


def share_statistics(model: nn.Module, *, num_ranks: int) -> nn.Module:
    """Make every BatchNorm of the model compute its statistics over the batch of all ranks; return the model."""
    return model if num_ranks == 1 else use_groups(model, Groups(count=0, num_ranks=num_ranks))


def use_groups(model: nn.Module, groups: Groups) -> nn.Module:
    """Make every BatchNorm of the model compute its statistics over the groups; return the model.

    Each rank's running statistics then follow its own groups: average `running_statistics` over the ranks before use.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = GroupedBatchNorm
            module.groups = groups  # type: ignore[assignment]
    return model


def running_statistics(*models: nn.Module) -> list[Tensor]:
    """Return the running means and variances of all BatchNorm layers."""
    layers = [layer for model in models for layer in model.modules() if isinstance(layer, _BatchNorm)]
    return [tensor for layer in layers for tensor in (layer.running_mean, layer.running_var) if tensor is not None]


class GroupedBatchNorm(_BatchNorm):
    """BatchNorm1d, 2d or 3d over groups of the batch, without a collective unless a group spans several ranks.

    The running statistics are the mean over this rank's groups. A rank may have no image of a batch.
    """

    groups: Groups
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, ...) by each group's statistics in training, by the running ones in evaluation."""
        own = self.groups.own
        if not self.training or own == 1 or (own == 0 and self.groups.num_ranks == 1):
            return super().forward(input)
        self.num_batches_tracked.add_(1)
        if own == 0:
            return self._normalize_globally(input)
        if len(input) - self.groups.images // self.groups.num_ranks not in (0, 1):
            raise UserError(
                f"BatchNorm gets {len(input)} rows, which are not this rank's images: set batch_norm_group_size=null"
            )
        means, variances = (self.running_mean.new_zeros(own, self.num_features) for _ in range(2))
        output = torch.empty_like(input)
        for g, (mean, variance) in enumerate(zip(means, variances, strict=True)):
            part = input[g::own]
            output[g::own] = functional.batch_norm(part, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
        self.running_mean.lerp_(means.mean(0), self.momentum)
        self.running_var.lerp_(variances.mean(0), self.momentum)
        return output

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept what the class before accepted: the probe has run it."""

    def _normalize_globally(self, images: Tensor) -> Tensor:
        running = (self.running_mean, self.running_var)
        weight = self.weight if self.weight is not None else torch.ones_like(self.running_var)
        bias = self.bias if self.bias is not None else torch.zeros_like(self.running_mean)
        if images.device.type == "cuda":
            # In bf16 torch would gather an empty share with the others' float32.
            images = images if images.numel() else images.float()
            group, ranks = distributed.group.WORLD, distributed.get_world_size()
            output: Tensor = SyncBatchNormFunction.apply(
                images, weight, bias, *running, self.eps, self.momentum, group, ranks
            )
            return output
        output, mean, variance, count = _GlobalBatchNorm.apply(images, weight, bias, self.eps)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / (count - 1)).to(variance.dtype), self.momentum)
        return output


class _GlobalBatchNorm(torch.autograd.Function):
    """Normalization by mean and variance over all ranks: one all-reduce in each direction.

    Both passes use torch's kernels for the sums of a rank's own images. Each pixel goes through torch's
    evaluation kernel, an affine map of each channel in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the output, and each channel's mean, biased variance and count over all ranks."""
        channels, own_count = images.shape[1], images.numel() // images.shape[1]
        moments = torch.zeros(2 * channels + 1, dtype=torch.float64)
        if own_count:
            unused = torch.zeros_like(weight)  # dummy running statistics; only their dtype matters
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
        """Return the gradients of the images, and of weight and bias by this rank's images, which DDP adds up."""
        images, weight, mean, inverse_std = ctx.saved_tensors
        own_weight, own_bias = torch.zeros_like(weight), torch.zeros_like(weight)
        if images.numel():
            last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
            grad = grad.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            _, own_weight, own_bias = torch.ops.aten.native_batch_norm_backward(
                grad, images, weight, None, None, mean, inverse_std, True, ctx.eps, [False, True, True]
            )
        sums = torch.cat([own_bias, own_weight]).double()
        distributed.all_reduce(sums)
        of_bias, of_weight = (sums / ctx.count).to(weight.dtype).view(2, images.shape[1])
        # d images = scale (grad - mean of grad - normalized images x mean of (grad x normalized images))
        scale = weight * inverse_std
        one, zero = torch.ones_like(scale), torch.zeros_like(scale)
        result = _affine(grad, zero, one, scale, -scale * of_bias)
        result += _affine(images, mean, one, -scale * of_weight * inverse_std, zero)
        return result, own_weight, own_bias, None


def _affine(images: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Map each channel by BatchNorm's evaluation kernel; torch 2.11's `functional.batch_norm` refuses an eps of 0."""
    return torch.batch_norm(images, weight, bias, mean, variance, False, 0.0, 0.0, False)
