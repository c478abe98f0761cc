"""Start the process group and Accelerate: device placement, mixed precision, gradient scaling, reductions."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import DistributedDataParallelKwargs, TorchDynamoPlugin
from torch import Tensor, distributed, nn

from cifar_dist.config.accelerate_config import AccelerateConfig, cpu_requested
from cifar_dist.config.cpus import choose_num_threads
from cifar_dist.config.errors import SharedError, UserError
from cifar_dist.config.world import World
from cifar_dist.runtime import device as device_module
from cifar_dist.runtime.device import SHARE_GPU, ComputeSettings
from cifar_dist.runtime.ranks import Ranks, rendezvous

_SHARED_STATES = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
"""All Accelerators of a process share these."""
_WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


class Runtime:
    """The device of this process, its precision, and Accelerate's operations. Built by `start`."""

    def __init__(self, accelerator: Accelerator, ranks: Ranks, compute: ComputeSettings) -> None:
        self.accelerator = accelerator
        self.ranks = ranks
        self.compute = compute
        self.world, self.is_main = ranks.world, ranks.is_main
        self.precision, self.num_threads = compute.precision, compute.num_threads
        self.device: torch.device = accelerator.device
        self.memory_format = device_module.memory_format(self.device.type)

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, has_unused_parameters: bool = False
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Wrap a model, which is on the device, and its optimizer for this world and precision.

        DDP looks for parameters without a gradient only with `has_unused_parameters`, because that takes time.
        """
        if self.accelerator.ddp_handler is not None:
            self.accelerator.ddp_handler.find_unused_parameters = has_unused_parameters
        with warnings.catch_warnings():
            # accelerate 1.15 uses an argument that torch 2.14 deprecates.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return self.accelerator.prepare(model, optimizer)

    def compile(self, model: nn.Module, backend: str) -> nn.Module:
        """Compile a model as `prepare` does."""
        options = self.accelerator.state.dynamo_plugin.to_kwargs() | {"backend": backend.lower()}
        return torch.compile(model, **options)  # type: ignore[return-value]

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks. A collective."""
        return self.accelerator.reduce(tensor, reduction="sum")

    def average_over_ranks(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor in place by its mean over all ranks. One collective."""
        if self.world.size == 1 or not tensors:
            return
        mean = self.sum_over_ranks(torch.cat([tensor.flatten() for tensor in tensors])) / self.world.size
        for tensor, part in zip(tensors, torch.split(mean, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def state(self) -> dict[str, Any]:
        """Return the state of the gradient scaler, and `rng`: the states of torch's global generators.

        Nothing here draws from those; a user's own model or transforms may.
        """
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            rng[self.device.type] = torch.get_device_module(self.device).get_rng_state()
        scaler = self.accelerator.scaler
        return {"scaler": None if scaler is None else scaler.state_dict(), "rng": rng}

    def load_state(self, content: Mapping[str, Any]) -> None:
        """Restore what `state` returned. A run that continues in another precision starts a new scaler."""
        if content["scaler"] and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        torch.set_rng_state(content["rng"]["cpu"])
        if self.device.type in content["rng"] and self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(content["rng"][self.device.type])

    def synchronize(self) -> None:
        """Wait until the device has finished."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def peak_memory_mib(self) -> int | None:
        """Return the peak memory of the device on CUDA, else of the process; None if it is unknown."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) // 2**20
        return device_module.peak_process_memory_mib()


def tracker_class(name: str) -> Any:
    """Return Accelerate's class of a tracker."""
    return LOGGER_TYPE_TO_CLASS[name]


@contextmanager
def connect(world: World, config: AccelerateConfig) -> Iterator[Ranks]:
    """Start the process group, and destroy it at the end of the context.

    Accelerate reads the world from environment variables, which are restored at the end. Raises UserError if these
    processes cannot be a world.
    """
    facts = device_module.probe(use_cpu=cpu_requested(config, os.environ))
    device_module.check_world(world, facts.type, os.environ)
    before, threads = _own_variables(), torch.get_num_threads()
    callers_states = [dict(state) for state in _SHARED_STATES]
    callers_group = distributed.is_available() and distributed.is_initialized()
    for shared in _SHARED_STATES:  # else a caller's own Accelerator would configure ours
        shared.clear()
    try:
        _set_environment(world, cpu=facts.type == "cpu")
        # Accelerate would choose MPI if torch has it, and NCCL for ranks that share a GPU, which NCCL refuses.
        gloo = world.size > 1 and (facts.type == "cpu" or bool(os.environ.get(SHARE_GPU)))
        is_joining = world.size > 1 and not callers_group
        ranks = rendezvous(world, "gloo" if gloo else "nccl") if is_joining else Ranks(world)
        state = PartialState(cpu=facts.type == "cpu", **({"backend": "gloo"} if gloo else {}))
        if state.num_processes != world.size:
            raise UserError(
                f"Accelerate sees {state.num_processes} process where {world.size} were started:"
                " each would train alone; name the device in --config"
            )
        try:
            yield ranks
        except SharedError:
            if not callers_group:
                state.destroy_process_group()
            raise
        # After any other exception the other ranks may be gone, and this would wait for them.
        if not (ranks.abandoned or callers_group):
            state.destroy_process_group()
    finally:
        for shared, values in zip(_SHARED_STATES, callers_states, strict=True):
            shared.clear()
            shared.update(values)
        torch.set_num_threads(threads)
        for name in _own_variables().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _own_variables() -> dict[str, str]:
    """Return the environment variables that this module, Accelerate and torch set or remove."""
    return {name: value for name, value in os.environ.items() if name in _WORLD or name.startswith("ACCELERATE_")}


def start(
    ranks: Ranks,
    config: AccelerateConfig,
    *,
    requested_precision: str | None = None,
    num_threads: int | None = None,
    doing: str = "training",
    micro_batches: int = 1,
) -> Runtime:
    """Choose device, precision and threads, and start Accelerate on them.

    `num_threads` is that of a checkpoint; None chooses it for this machine. `doing` is a word for the notes. Raises
    UserError if Accelerate cannot be started as requested, or if the ranks chose different precisions.
    """
    world = ranks.world
    compute = device_module.choose_compute(
        config,
        os.environ,
        world,
        requested_precision=requested_precision,
        num_threads=num_threads,
        doing=doing,
        micro_batches=micro_batches,
    )
    _check_one_precision(compute.precision, ranks)
    torch.set_num_threads(compute.num_threads)
    if compute.device_type == "cpu":
        device_module.keep_freed_memory()
    # DDP need not broadcast the running statistics: they are equal on all ranks, or averaged before use.
    wrapping = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(
        cpu=compute.device_type == "cpu",
        mixed_precision=compute.precision,
        dynamo_plugin=TorchDynamoPlugin(
            backend=compute.compiler or "NO",
            mode=config.dynamo_mode or "default",
            dynamic=False,
        ),
        kwargs_handlers=[wrapping] if world.size > 1 else [],
    )
    if accelerator.device.type != compute.device_type:
        raise UserError(
            f"Accelerate chose {accelerator.device.type} where {compute.device_type} was meant: name it in --config"
        )
    return Runtime(accelerator, ranks, compute)


def _check_one_precision(precision: str, ranks: Ranks) -> None:
    """Raise SharedError on all ranks if they chose different precisions, as machines of several kinds may."""
    names = ("no", "fp16", "bf16")
    chosen = sorted({names[int(number)] for (number,) in ranks.all_gather([names.index(precision)])})
    if len(chosen) > 1:
        raise SharedError(f"the processes chose different precisions ({', '.join(chosen)}): type --precision no")


def _set_environment(world: World, *, cpu: bool) -> None:
    """Set the environment variables from which Accelerate and torch read the world."""
    # Accelerate would apply an outer launcher's variables (FSDP, dynamo, a device) in part.
    kept = ("ACCELERATE_MIXED_PRECISION", *(["ACCELERATE_USE_CPU"] if cpu else []))
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") and name not in kept]:
        del os.environ[name]
    if world.size == 1:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        return
    visible = torch.cuda.device_count() if torch.cuda.is_available() else world.local_size
    threads, _ = choose_num_threads(os.environ, world, torch_threads=torch.get_num_threads())
    os.environ |= {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        # Also the GPU's index: a Slurm task may see fewer GPUs than there are tasks.
        "LOCAL_RANK": str(world.local_rank % visible),
        "LOCAL_WORLD_SIZE": str(world.local_size),
        "OMP_NUM_THREADS": str(threads),  # otherwise Accelerate chooses, with a warning
    }
    if world.main_address is not None:
        os.environ["MASTER_ADDR"] = world.main_address
    if world.main_port is not None:
        os.environ["MASTER_PORT"] = str(world.main_port)
