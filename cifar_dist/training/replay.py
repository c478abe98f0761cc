"""Training steps that are recorded once for each shape of batch, and from then on replayed with other images."""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from cifar_dist.data.loader import Batch
from cifar_dist.runtime.graphs import EAGER_STEPS

_CANNOT_BE_RECORDED = (
    "A training step could not be recorded as a CUDA graph: something in it makes the host wait for the GPU (.item(),"
    " .cpu(), a print)."
)
_NEEDS_MEMORY = "A recorded step has memory of its own, beside that of the steps before it."
_WAY_OUT = " With dynamo_config: {dynamo_backend: 'NO'} in --config steps are not recorded."


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Recording:
    batch: Batch
    """Its tensors are the memory from which the recorded step reads."""
    rates: tuple[Tensor, ...]
    """Likewise, the learning rate of each group of parameters."""
    replay: Callable[[], object]


class ReplayedSteps:
    """Does whole training steps by replaying them, where a step of that kind has been recorded.

    A recorded step has Python's values as they were. The batch and the learning rates, which change from one step to
    the next, are handed over in tensors of the recording's own; what else changes must lie in tensors already.
    """

    def __init__(
        self, record: Callable[[Callable[[], object]], Callable[[], object]], optimizer: torch.optim.Optimizer
    ) -> None:
        """`record` takes work and gives what repeats it, as runtime/graphs.py does."""
        self._record = record
        self._optimizer = optimizer
        self._done: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, _Recording] = {}

    def do(self, work: Callable[[Batch], None], batch: Batch, *, kind: Hashable) -> None:
        """Do `work`, a whole step, on a batch; all work of one `kind` on images of one shape is the same."""
        key = (kind, batch.images.shape)
        if key not in self._recordings:
            if self._done[key] < EAGER_STEPS:
                self._done[key] += 1
                work(batch)
                return
            self._recordings[key] = self._recorded(work, batch)
        recording = self._recordings[key]
        for own, tensor in zip(_tensors(recording.batch).values(), _tensors(batch).values(), strict=True):
            own.copy_(tensor)
        for rate, group in zip(recording.rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        recording.replay()

    def _recorded(self, work: Callable[[Batch], None], batch: Batch) -> _Recording:
        copies: dict[str, Any] = {name: tensor.clone() for name, tensor in _tensors(batch).items()}
        own = replace(batch, **copies)
        groups = self._optimizer.param_groups
        rates = tuple(torch.zeros((), device=batch.images.device) for _ in groups)
        before = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        try:
            replay = self._record(lambda: work(own))
        except RuntimeError as error:
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            error.add_note((_NEEDS_MEMORY if out_of_memory else _CANNOT_BE_RECORDED) + _WAY_OUT)
            raise
        finally:
            for group, number in zip(groups, before, strict=True):
                group["lr"] = number
        return _Recording(batch=own, rates=rates, replay=replay)


def _tensors(batch: Batch) -> dict[str, Tensor]:
    values = {each.name: getattr(batch, each.name) for each in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
