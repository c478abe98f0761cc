"""Dropout, stochastic depth and attention dropout whose masks are functions of the sample, not of its batch or rank.

A mask is a hash of (seed, epoch, sample, module, call within the forward pass, element), so it is the same at every
world size and after a resume. `probe.py` finds the modules and the dimension of their input that holds the samples.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import StochasticDepth

from cifar_dist.config.errors import UserError

_GOLDEN = 0x9E3779B1  # 2^32 / golden ratio


class Draws:
    """What the masks of a forward pass depend on.

    All that varies between steps is in tensors on the device: a CUDA graph freezes Python values. The calls of each
    module are counted from 0 in each forward pass, so they are the same in every replay.
    """

    def __init__(self, device: torch.device) -> None:
        self._key = torch.zeros(2, dtype=torch.int64, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._samples: Tensor | None = None
        self._calls: dict[str, int] = {}

    def set_key(self, key: int) -> None:
        """Set the key of the next batches, 63 bits that stand for seed and epoch."""
        low, high = self._key
        low.fill_(key & 0xFFFFFFFF)
        high.fill_(key >> 32)

    def set_step(self, step: int) -> None:
        """Set the step of the next batches, for masks that all samples of a step share."""
        self._step.fill_(step)

    def begin(self, samples: Tensor) -> None:
        """Begin a forward pass of `samples` (B,) int64, their indices in the dataset."""
        self._samples = self._hash(samples)
        self._calls.clear()

    def place(self, name: str, batch_dim: int | None) -> "Place":
        """Return the source of a module's masks."""
        return Place(draws=self, name=name, salt=zlib.crc32(name.encode()), batch_dim=batch_dim)

    def rows(self, place: "Place", *, of_step: bool) -> Tensor:
        """Count a call at `place`. Return its hash of each sample (B,), or of the step (1,), int64 below 2^32."""
        if self._samples is None:
            raise RuntimeError("a network with dropout runs in training before Draws.begin")
        calls = self._calls.get(place.name, 0)
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            # Activation checkpointing runs the module again in the backward pass.
            if calls != 1:
                raise UserError(
                    f"'{place.name}' is called {calls} times in a forward pass, and again by activation checkpointing:"
                    " give each call a dropout module of its own"
                )
            calls = 0
        self._calls[place.name] = calls + 1
        hashes = self._hash(self._step) if of_step else self._samples
        return _mix(hashes + ((place.salt + calls * _GOLDEN) & 0xFFFFFFFF))

    def _hash(self, numbers: Tensor) -> Tensor:
        return _mix(_mix(numbers + self._key[0]) + self._key[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A module in the network, and how its input lies."""

    draws: Draws
    name: str
    salt: int
    batch_dim: int | None
    """The dimension that holds the samples; None: unknown."""

    def mask(self, shape: torch.Size, probability: float, dtype: torch.dtype) -> Tensor:
        """Return a mask of `shape`, in which a share of `probability` is 0 and the rest 1 / (1 - probability)."""
        rows = self.draws.rows(self, of_step=False)
        if self.batch_dim is None or len(shape) <= self.batch_dim or shape[self.batch_dim] != len(rows):
            raise UserError(
                f"'{self.name}' gets an input of shape {list(shape)} for {len(rows)} images, unlike at the start:"
                " let every forward pass call it in the same way"
            )
        rest = [size for dim, size in enumerate(shape) if dim != self.batch_dim]
        kept = keep(rows, math.prod(rest), probability).view(len(rows), *rest).movedim(0, self.batch_dim)
        return _scaled(kept, probability, dtype)

    def mask_of_step(self, probability: float, dtype: torch.dtype) -> Tensor:
        """Return one number, (1,), for all samples of the step."""
        return _scaled(keep(self.draws.rows(self, of_step=True), 1, probability)[0], probability, dtype)


def keep(rows: Tensor, count: int, probability: float) -> Tensor:
    """Return (B, count) bool that is False with `probability`: hashes of (row, column) for `rows` (B,) of `Draws.rows`.

    Rows and columns are hashed alone, and their pairs mixed in six passes of int32, whose products wrap on all devices.
    """
    threshold = min(round(probability * 2**32), 2**32 - 1)
    if count == 1:
        return (rows >= threshold).unsqueeze(1)
    columns = _mix(torch.arange(count, device=rows.device) * _GOLDEN)
    mixed = (rows - 2**31).to(torch.int32).unsqueeze(1) ^ (columns - 2**31).to(torch.int32)
    mixed *= _GOLDEN - 2**32
    mixed ^= mixed >> 15
    mixed *= 0x85EBCA6B - 2**32
    return mixed >= threshold - 2**31


def _mix(value: Tensor) -> Tensor:
    """Mix the low 32 bits by MurmurHash3's finalizer, in int64, which is exact on every device."""
    value = value & 0xFFFFFFFF
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return value ^ (value >> 16)


def _scaled(kept: Tensor, probability: float, dtype: torch.dtype) -> Tensor:
    return kept.to(dtype).mul_(1 / (1 - probability) if probability < 1 else 0.0)


class TrackedDropout(_DropoutNd):
    """torch.nn.Dropout."""

    place: Place

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements."""
        if not self.training or self.p == 0:
            return input
        mask = self.place.mask(self._mask_shape(input), self.p, input.dtype)
        return input.mul_(mask) if self.inplace else input * mask

    def _mask_shape(self, input: Tensor) -> torch.Size:
        return input.shape


class TrackedChannelDropout(TrackedDropout):
    """torch.nn.Dropout1d, 2d and 3d: whole channels."""

    def _mask_shape(self, input: Tensor) -> torch.Size:
        return torch.Size([*input.shape[:2], *[1] * (input.ndim - 2)])


class TrackedStochasticDepth(StochasticDepth):  # type: ignore[misc]
    """torchvision's StochasticDepth (arXiv 1603.09382)."""

    place: Place

    def forward(self, input: Tensor) -> Tensor:
        """Drop whole samples, or all of them."""
        if not self.training or self.p == 0:
            return input
        if self.mode == "batch":
            return input * self.place.mask_of_step(self.p, input.dtype)
        return input * self.place.mask(torch.Size([len(input), *[1] * (input.ndim - 1)]), self.p, input.dtype)


class TrackedMultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention, whose dropout acts on the attention weights."""

    place: Place

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend. With dropout, `is_causal` is a hint that changes nothing: torch requires `attn_mask` with it."""
        if not self.training or self.dropout == 0:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        inputs = (query, key, value) if self.batch_first else (each.transpose(0, 1) for each in (query, key, value))
        q, k, v = (self._heads(each, *layer) for each, layer in zip(inputs, self._projections(), strict=True))
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        if attn_mask is not None:  # (L, S) or (N * num_heads, L, S)
            of_heads = (self.num_heads if attn_mask.ndim == 3 else 1, *attn_mask.shape[-2:])
            scores = scores + _additive(attn_mask, scores).view(-1, *of_heads)
        if key_padding_mask is not None:
            scores = scores + _additive(key_padding_mask, scores)[:, None, None]
        weights = scores.softmax(-1)
        weights = weights * self.place.mask(weights.shape, self.dropout, weights.dtype)
        output = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        output = output if self.batch_first else output.transpose(0, 1)
        return output, (weights.mean(1) if average_attn_weights else weights) if need_weights else None

    def _projections(self) -> list[tuple[Tensor, Tensor | None]]:
        """Return weight and bias of the projections of query, key and value."""
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = self.in_proj_weight.chunk(3) if self._qkv_same_embed_dim else separate
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return list(zip(weights, biases, strict=True))

    def _heads(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Project (N, L, features); return (N, num_heads, L, head_dim)."""
        projected = functional.linear(input, weight, bias)
        return projected.view(*input.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)


def _additive(mask: Tensor, scores: Tensor) -> Tensor:
    """Return what is added to the scores: -inf where a bool mask is True; another mask is added as it is."""
    return (
        torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask
    )


TRACKED: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.Dropout: TrackedDropout,
    nn.Dropout1d: TrackedChannelDropout,
    nn.Dropout2d: TrackedChannelDropout,
    nn.Dropout3d: TrackedChannelDropout,
    StochasticDepth: TrackedStochasticDepth,
    nn.MultiheadAttention: TrackedMultiheadAttention,
}
"""The classes whose random numbers are tracked, and what replaces them. Subclasses are not: they may do otherwise."""


def track_randomness(model: nn.Module, draws: Draws, batch_dims: Mapping[str, int | None]) -> None:
    """Make the modules named in `batch_dims` (see `NetworkTraits`) draw from `draws`; weights, keys and hooks stay."""
    for name, batch_dim in batch_dims.items():
        module = model.get_submodule(name)
        if type(module) is nn.MultiheadAttention and batch_dim == 1:
            batch_dim = 0  # of the attention weights, which are masked
        module.__class__ = TRACKED[type(module)]
        module.place = draws.place(name, batch_dim)  # type: ignore[assignment]


def drop_inputs(head: nn.Module, probability: float, draws: Draws) -> None:
    """Drop inputs (B, ...) of the last layer in training; the model's state dict stays as it was."""
    place = draws.place("input of the head", 0)

    def drop(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not module.training:
            return None
        return (inputs[0] * place.mask(inputs[0].shape, probability, inputs[0].dtype),)

    head.register_forward_pre_hook(drop)
