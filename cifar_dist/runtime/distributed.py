"""The one place that knows Accelerate: device placement, mixed precision, reductions, and what one process may do."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from cifar_dist.config.errors import UserError
from cifar_dist.config.world import AccelerateConfig, World, wished_precision
from cifar_dist.runtime import device as device_module


@dataclass(kw_only=True, eq=False)
class Runtime:
    """Where this process runs. Made by `start`, ended by `close`; nobody else knows Accelerate."""

    accelerator: Accelerator
    world: World
    precision: str
    precision_reason: str
    num_threads: int
    notes: tuple[str, ...]
    """Lines that a person should read: what was asked for and could not be had."""

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the console."""
        return self.world.rank == 0

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of activations on this device."""
        return device_module.memory_format(self.device.type)

    @property
    def threads_line(self) -> str:
        """The number of threads in words."""
        return f"{self.num_threads} thread{'s' if self.num_threads > 1 else ''}"

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Wrap a model (already on the device) and its optimiser for this world and precision."""
        prepared: tuple[nn.Module, torch.optim.Optimizer] = self.accelerator.prepare(model, optimizer)
        return prepared

    def autocast(self) -> AbstractContextManager[Any]:
        """Give the context in which a forward pass has this run's precision."""
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def backward(self, loss: Tensor) -> None:
        """Backpropagate, scaled where fp16 needs it."""
        self.accelerator.backward(loss)

    def gradient_sync(self, model: nn.Module, sync: bool) -> AbstractContextManager[Any]:
        """Give the context in which gradients are only added up locally, or made equal on all processes."""
        context: AbstractContextManager[Any] = nullcontext() if sync else self.accelerator.no_sync(model)
        return context

    def clip_gradients(self, model: nn.Module, largest_norm: float) -> None:
        """Scale all gradients down so that their norm is at most `largest_norm`."""
        self.accelerator.clip_grad_norm_(model.parameters(), largest_norm)

    def sum_over_ranks(self, sums: Tensor) -> Tensor:
        """Add a tensor up over all processes."""
        total: Tensor = self.accelerator.reduce(sums, reduction="sum")
        return total

    def scaler_state(self) -> dict[str, Any] | None:
        """Give the gradient scaler's state, None where there is no scaler."""
        return None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        """Restore what `scaler_state` gave; a run that goes on in another precision starts a new scaler."""
        if state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state)

    def synchronize(self) -> None:
        """Wait for the device to finish what it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def peak_memory_mib(self) -> int | None:
        """Give the largest memory so far: of the device on CUDA, of the process elsewhere; None where unknown."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) // 2**20
        return device_module.peak_process_memory_mib()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process group, and forget Accelerate's process-wide state so that another run may follow."""
        self.accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)


def start(
    world: World,
    config: AccelerateConfig,
    *,
    typed_precision: str | None = None,
    num_threads: int | None = None,
    doing: str = "training",
) -> Runtime:
    """Choose device, precision and threads, and start Accelerate on them.

    `num_threads` is a resumed run's or a checkpoint's; None: chosen for this machine. `doing` is a word for the notes.
    Raises UserError where Accelerate cannot be started as asked.
    """
    facts = device_module.probe(use_cpu=config.use_cpu)
    notes = []
    if facts.type == "cpu" and not config.use_cpu:
        notes.append(f"no MPS or CUDA device here: {doing} on cpu")
    choice = device_module.resolve_precision(wished_precision(typed_precision, config, os.environ), facts)
    if choice.differs:
        notes.append(f"{choice.reason}: using {choice.precision}")
    threads = num_threads or device_module.choose_num_threads(
        os.environ, cores=device_module.usable_cores(), local_processes=world.size, default=torch.get_num_threads()
    )
    torch.set_num_threads(threads)
    accelerator = Accelerator(cpu=facts.type == "cpu", mixed_precision=choice.precision)
    if accelerator.device.type != facts.type:
        raise UserError(f"Accelerate chose {accelerator.device.type} where {facts.type} was meant: name it in --config")
    return Runtime(
        accelerator=accelerator,
        world=world,
        precision=choice.precision,
        precision_reason=choice.reason,
        num_threads=threads,
        notes=tuple(notes),
    )
