"""What an Accelerate config asks for, and what that means beside running processes and the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cifar_dist.config.errors import UserError
from cifar_dist.config.recipe import Count, Natural
from cifar_dist.config.schema import build, read_yaml
from cifar_dist.config.world import LAUNCHED, World

CONFIGS = Path(__file__).with_name("accelerate_configs")
"""The example configs. In a checkout it links to the folder of that name at its top."""
_IGNORED = frozenset(
    """
    command_file commands debug deepspeed_config downcast_bf16 enable_cpu_affinity fp8_config fsdp_config
    main_training_function megatron_lm_config mpirun_config rdzv_backend tpu_env tpu_name tpu_use_cluster tpu_use_sudo
    tpu_vm tpu_zone
    """.split()
)
"""Other keys that `accelerate launch --config_file` reads."""
_DEFAULTS: tuple[Any, ...] = (None, False, "", "no", "main", "static", [], {})
"""What `accelerate config` writes for them where nobody asked for anything."""
DynamoBackend = Literal["NO", "EAGER", "AOT_EAGER", "INDUCTOR", "CUDAGRAPHS"]
"""What may compile the model. EAGER and AOT_EAGER only test the tracing. NO: nothing, nor are steps captured.

CUDAGRAPHS captures the whole training step with the optimizer, and torch's backend only the model. On one GPU it is the
default. If it is named and cannot be done, a note says why.
"""

_MULTI_PROCESS_PLUGINS = {"use_fsdp": "FSDP", "use_deepspeed": "DEEPSPEED", "use_megatron_lm": "MEGATRON_LM"}


@dataclass(frozen=True, kw_only=True, slots=True)
class AccelerateConfig:
    """The part of an Accelerate config that is used here. The defaults are those of no config."""

    path: str | None = None
    num_processes: Count = 1
    """Of all machines together, as Accelerate counts them."""
    processes_typed: bool = False
    """Whether `num_processes` is that of the command line, not the file's."""
    num_machines: Count = 1
    machine_rank: Natural = 0
    main_process_ip: str | None = None
    main_process_port: Natural | None = None
    compute_environment: Literal["LOCAL_MACHINE"] = "LOCAL_MACHINE"
    distributed_type: Literal["NO", "MULTI_GPU", "MULTI_CPU"] | None = None
    use_cpu: bool = False
    """True: the CPU. False: the best accelerator there is."""
    gpu_ids: str | None = None
    """The GPUs to use, as CUDA_VISIBLE_DEVICES names them; None: all that are visible."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    dynamo_backend: DynamoBackend | None = None
    dynamo_mode: Literal["default", "reduce-overhead", "max-autotune"] | None = None
    notes: tuple[str, ...] = ()
    """What was asked for and is ignored."""

    @property
    def compiler(self) -> str | None:
        """The backend that compiles the model; None: nothing does."""
        return None if self.dynamo_backend == "NO" else self.dynamo_backend


def config_names() -> list[str]:
    """Return the names of the example configs in alphabetical order."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load_accelerate_config(path: str | None, environ: Mapping[str, str] = os.environ) -> AccelerateConfig:
    """Read an Accelerate config file, or what an outer `accelerate launch` was asked for. Raises UserError.

    Both follow the same rules. With neither it is one process on the best device.
    """
    notes: tuple[str, ...] = ()
    if path is not None:
        values, what = read_yaml(Path(path), "Accelerate config"), f"Accelerate config {path}"
    else:
        values, what = _read_environment(environ), "accelerate launch"
        if "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_PORT" in environ and "WORLD_SIZE" not in environ:
            notes = ("accelerate launch started one process: it starts several with distributed_type MULTI_GPU alone",)
    if ignored := sorted(key for key in values.keys() & _IGNORED if values[key] not in _DEFAULTS):
        notes = (*notes, f"{what}: ignored here: {', '.join(ignored)}")
    try:
        return replace(_parse(values), path=path, notes=notes)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def _read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the variables of an outer `accelerate launch` as keys of a config. Its `no` is also the default."""
    told = {name[11:].lower(): value.lower() for name, value in environ.items() if name.startswith("ACCELERATE_")}
    on = {name for name, value in told.items() if value in ("1", "true")}
    dynamo = {name: name in on if "_use_" in name else value for name, value in told.items() if "dynamo_" in name}
    return {
        "distributed_type": next((kind for name, kind in _MULTI_PROCESS_PLUGINS.items() if name in on), None),
        "parallelism_config": "use_parallelism_config" in on,
        "debug": "debug_mode" in on,
        "enable_cpu_affinity": "cpu_affinity" in on,
        "mixed_precision": None if told.get("mixed_precision") == "no" else told.get("mixed_precision"),
        "dynamo_config": {name: value for name, value in dynamo.items() if value != "no"},
    }


def _parse(values: Mapping[str, Any]) -> AccelerateConfig:
    """Build a config from the keys of a file. Raises UserError."""
    known = {key: value for key, value in values.items() if key not in _IGNORED and key != "same_network"}
    if known.pop("parallelism_config", None):
        raise UserError("parallelism_config is not served: each process holds the whole model")
    # Accelerate still reads these two keys of older versions, in this way.
    if known.pop("fp16", None) is True:
        known.setdefault("mixed_precision", "fp16")
    dynamo, backend = known.pop("dynamo_config", None) or {}, known.pop("dynamo_backend", None)
    if backend is not None:
        dynamo = {} if str(backend).upper() == "NO" else {"dynamo_backend": backend}
    if not isinstance(dynamo, Mapping):
        raise UserError(f"dynamo_config must be a mapping, not {dynamo!r}")
    for key, value in dynamo.items():
        name = f"dynamo_{str(key).removeprefix('dynamo_')}"
        if name in ("dynamo_backend", "dynamo_mode"):
            known[name] = value.upper() if name == "dynamo_backend" and isinstance(value, str) else value
        elif value is not False:  # `accelerate config` writes what is switched off
            raise UserError(f"{name} is not served")
    if type(gpus := known.get("gpu_ids")) in (int, str):
        known["gpu_ids"] = None if gpus == "all" else str(gpus)
    config = build(AccelerateConfig, known, kind="key")
    processes, machines = config.num_processes, config.num_machines
    if config.distributed_type == "NO" and processes > 1:
        raise UserError("distributed_type 'NO' is one process: write MULTI_GPU for several, also on CPUs")
    if processes % machines:
        raise UserError(f"num_processes={processes} of all machines does not divide by num_machines={machines}")
    if config.machine_rank >= machines:
        raise UserError(f"machine_rank={config.machine_rank} must be below num_machines={machines}")
    if machines > 1 and not config.main_process_ip:
        raise UserError("several machines need main_process_ip, the address of machine_rank 0")
    return config


def precision_requested(typed: str | None, config: AccelerateConfig, environ: Mapping[str, str]) -> str:
    """Return the precision of the flag, else of the config, else of the environment, else `auto`.

    `ACCELERATE_MIXED_PRECISION=no` does not count: `accelerate launch` sets it by default.
    """
    outer = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return typed or config.mixed_precision or (outer if outer in ("fp16", "bf16") else "auto")


def has_outer_launcher(environ: Mapping[str, str]) -> bool:
    """Return whether `accelerate launch` or torchrun started this process, and may have set OMP_NUM_THREADS=1."""
    return LAUNCHED not in environ and ("ACCELERATE_MIXED_PRECISION" in environ or "TORCHELASTIC_RUN_ID" in environ)


def cpu_requested(config: AccelerateConfig, environ: Mapping[str, str]) -> bool:
    """Return whether the config or `ACCELERATE_USE_CPU` asks for the CPU.

    What `accelerate launch` set does not count beside a typed config.
    """
    outer = environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    return config.use_cpu or (outer and (config.path is None or "ACCELERATE_MIXED_PRECISION" not in environ))


def with_processes(config: AccelerateConfig, typed: int | None, world: World) -> AccelerateConfig:
    """Override the config's number of processes by a typed one. Raises UserError if several machines contradict it."""
    if typed is None:
        return config
    if world.launcher == "none" and config.num_machines > 1 and typed != config.num_processes:
        raise UserError(
            f"--num-processes {typed} and {config.path} ({config.num_processes} on {config.num_machines} machines)"
            " contradict each other: leave out --num-processes"
        )
    return replace(config, num_processes=typed, processes_typed=True)


def processes_to_start(world: World, config: AccelerateConfig) -> int:
    """Return the number of processes to start; 1 if this process does the work, alone or in a world."""
    return config.num_processes if world.launcher == "none" else 1


def process_count_note(world: World, config: AccelerateConfig) -> str | None:
    """Return a note where the environment counts other processes than the config or the flag."""
    count, is_default = config.num_processes, config.path is None and not config.processes_typed
    if world.launcher == "none" or count == world.size or is_default:
        return None
    who = "Slurm started" if world.launcher == "slurm" else "WORLD_SIZE says"
    what = f"--num-processes {count}" if config.processes_typed else f"{config.path} ({count} processes)"
    return f"{who} {world.size} process{'es' if world.size > 1 else ''}: that counts, and not {what}"


def planned_world(world: World, config: AccelerateConfig) -> World:
    """Return the world in which a command would run, as its rank 0 sees it."""
    count = processes_to_start(world, config)
    return world if count == 1 else World(size=count, local_size=count // config.num_machines, launcher="torchrun")


def planned_processes(world: World, config: AccelerateConfig) -> str:
    """Return in words which processes would be started."""
    count, machines = processes_to_start(world, config), config.num_machines
    if world.size > 1:
        return f"nothing more: this is rank {world.rank} of {world.size} processes, started by {world.launcher}"
    where = "here" if machines == 1 else f"on each of {machines} machines"
    return f"{count // machines} processes {where}" if count > 1 else "one process"
