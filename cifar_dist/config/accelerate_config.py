"""What an Accelerate config asks for, and what that means beside the processes that are there and the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cifar_dist.config.errors import UserError
from cifar_dist.config.schema import convert, nearest, read_yaml
from cifar_dist.config.world import LAUNCHED, World

# What `accelerate launch --config_file` reads; another key is a ValueError there, so it is refused here too.
_SERVED = frozenset(
    """
    compute_environment distributed_type dynamo_backend dynamo_config fp16 gpu_ids machine_rank main_process_ip
    main_process_port mixed_precision num_machines num_processes parallelism_config same_network use_cpu
    """.split()
)
_IGNORED = frozenset(
    """
    command_file commands debug deepspeed_config downcast_bf16 enable_cpu_affinity fp8_config fsdp_config
    main_training_function megatron_lm_config mpirun_config rdzv_backend tpu_env tpu_name tpu_use_cluster tpu_use_sudo
    tpu_vm tpu_zone
    """.split()
)
_UNASKED: tuple[Any, ...] = (None, False, "", "no", "main", "static", [], {})
"""What `accelerate config` writes for ignored keys of which nothing was asked."""

_COMPILERS = ("EAGER", "AOT_EAGER", "INDUCTOR", "CUDAGRAPHS")
"""Backends of torch.compile that Accelerate names and that train; two of them only test the tracing.

CUDAGRAPHS here is more than torch's: whole training steps, with the optimiser's part, are recorded and replayed. On one
GPU that is done anyway, unless a config says NO or compiles; named, it says where it cannot be done.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class AccelerateConfig:
    """What an Accelerate config file (or its absence) asks of the world."""

    path: str | None = None
    num_processes: int = 1
    """Of all machines together, as Accelerate counts them."""
    processes_typed: bool = False
    """Whether that number was typed, and is not the file's."""
    num_machines: int = 1
    machine_rank: int = 0
    main_process_ip: str | None = None
    main_process_port: int | None = None
    use_cpu: bool = False
    """True: the CPU. False: the best accelerator there is."""
    gpu_ids: str | None = None
    """The GPUs to use, as CUDA_VISIBLE_DEVICES names them; None: all that are visible."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """None where the file does not say."""
    dynamo_backend: str | None = None
    """What compiles the model (`dynamo_config`). NO: nothing, nor are steps replayed; None: the file does not say."""
    dynamo_mode: str | None = None
    """torch.compile's `mode`."""
    notes: tuple[str, ...] = ()
    """What was asked for and is not served, though it stops nothing."""


def load_accelerate_config(path: str | None, environ: Mapping[str, str] = os.environ) -> AccelerateConfig:
    """Read an Accelerate config file; without one, what an outer `accelerate launch` was asked for. Raises UserError.

    The same is served, noted and refused either way. With neither: one process on the best device.
    """
    if path is None:
        return _parse(_outer_values(environ), "accelerate launch", None, _outer_notes(environ))
    values = read_yaml(Path(path), "Accelerate config")
    what = f"Accelerate config {path}"
    environment = values.get("compute_environment", "LOCAL_MACHINE")  # others have keys of their own
    convert(Literal["LOCAL_MACHINE"], environment, f"{what}: compute_environment")
    for key in values:
        if key not in _SERVED | _IGNORED:
            hint = nearest(key, _SERVED | _IGNORED) or "; hyperparameters belong in a recipe"
            raise UserError(f"{what} has the unknown key '{key}'{hint}")
    if values.get("distributed_type") == "MPS":
        raise UserError(f"{what}: write distributed_type: 'NO' for a Mac (accelerate refuses MPS)")
    # Keys of older versions of Accelerate, which it still reads, in this way.
    if convert(bool, values.get("fp16", False), f"{what}: fp16"):
        values.setdefault("mixed_precision", "fp16")
    if backend := values.get("dynamo_backend"):
        values["dynamo_config"] = {} if str(backend).upper() == "NO" else {"dynamo_backend": backend}
    return _parse(values, what, path)


def _outer_values(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return what an outer `accelerate launch` was asked for, as a config file has it, from its variables.

    Its `no` stands for what nobody asked for, too.
    """
    told = {name[11:].lower(): value.lower() for name, value in environ.items() if name.startswith("ACCELERATE_")}
    on = {name for name, value in told.items() if value in ("1", "true")}
    kinds = {"use_fsdp": "FSDP", "use_deepspeed": "DEEPSPEED", "use_megatron_lm": "MEGATRON_LM"}
    dynamo = {name: name in on if "_use_" in name else value for name, value in told.items() if "dynamo_" in name}
    return {
        "distributed_type": next((kind for name, kind in kinds.items() if name in on), "MULTI_GPU"),
        "parallelism_config": "use_parallelism_config" in on,
        "debug": "debug_mode" in on,
        "enable_cpu_affinity": "cpu_affinity" in on,
        "mixed_precision": None if told.get("mixed_precision") == "no" else told.get("mixed_precision"),
        "dynamo_config": {name: value for name, value in dynamo.items() if value != "no"},
    }


def _outer_notes(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return a note if an outer `accelerate launch` was asked for several processes, and started one."""
    if "ACCELERATE_MIXED_PRECISION" not in environ or "MASTER_PORT" not in environ or "WORLD_SIZE" in environ:
        return ()
    return ("accelerate launch started one process: it starts several with distributed_type MULTI_GPU alone",)


def _parse(values: Mapping[str, Any], what: str, path: str | None, notes: tuple[str, ...] = ()) -> AccelerateConfig:
    """Make a config of its keys; `what` begins refusals. Raises UserError."""

    def given(key: str, hint: Any, default: Any = None) -> Any:
        """Return what the file has for a key, checked against a type."""
        return convert(hint, values.get(key, default), f"{what}: {key}")

    given("distributed_type", Literal["NO", "MULTI_GPU", "MULTI_CPU"], "NO")
    if values.get("parallelism_config"):
        raise UserError(f"{what}: parallelism_config is not served: each process holds the whole model")
    if ignored := sorted(key for key in values.keys() & _IGNORED if values[key] not in _UNASKED):
        notes = (*notes, f"{what}: ignored here: {', '.join(ignored)}")
    config = AccelerateConfig(
        path=path,
        num_processes=given("num_processes", int, 1),
        num_machines=given("num_machines", int, 1),
        machine_rank=given("machine_rank", int, 0),
        main_process_ip=given("main_process_ip", str | None),
        main_process_port=given("main_process_port", int | None) or None,
        use_cpu=given("use_cpu", bool, False),
        gpu_ids=_gpu_ids(values.get("gpu_ids"), path),
        mixed_precision=given("mixed_precision", Literal["no", "fp16", "bf16"] | None),
        **_dynamo(given("dynamo_config", dict | None) or {}, f"{what}: dynamo_config"),
        notes=notes,
    )
    _check_numbers(config)
    if config.num_processes > 1 and values.get("distributed_type") == "NO":
        raise UserError(f"{what}: distributed_type 'NO' is one process: write MULTI_GPU for several, also on CPUs")
    return config


def _check_numbers(config: AccelerateConfig) -> None:
    machines, processes, what = config.num_machines, config.num_processes, f"Accelerate config {config.path}"
    for field, least in {"num_processes": 1, "num_machines": 1, "machine_rank": 0, "main_process_port": 1}.items():
        number = getattr(config, field)
        if number is not None and number < least:
            raise UserError(f"{what}: {field} must be {least} or more, not {number}")
    if processes % machines:
        raise UserError(
            f"{what}: num_processes={processes} (of all machines together) does not divide by num_machines={machines}"
        )
    if config.machine_rank >= machines:
        raise UserError(f"{what}: machine_rank={config.machine_rank} must be below num_machines={machines}")
    if machines > 1 and not config.main_process_ip:
        raise UserError(f"{what}: several machines need main_process_ip, the address of machine_rank 0")


def wished_precision(typed: str | None, config: AccelerateConfig, environ: Mapping[str, str]) -> str:
    """Give the precision asked for: the flag, else the config, else the outer environment, else `auto`.

    `ACCELERATE_MIXED_PRECISION=no` is what `accelerate launch` sets when nobody asked for anything: it does not count.
    """
    outer = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return typed or config.mixed_precision or (outer if outer in ("fp16", "bf16") else "auto")


def _gpu_ids(value: Any, path: str | None) -> str | None:
    if value is None or value == "all":
        return None
    if type(value) not in (int, str):
        raise UserError(f"Accelerate config {path}: gpu_ids must be like 0,1 or all, not {value!r}")
    return str(value)


def _dynamo(values: Mapping[Any, Any], what: str) -> dict[str, Any]:
    """Read how the model is to be compiled. Raises UserError for what is not served."""
    served: dict[str, Any] = {
        "dynamo_backend": Literal["NO", *_COMPILERS],
        "dynamo_mode": Literal["default", "reduce-overhead", "max-autotune"],
    }
    chosen = {}
    for key, value in values.items():
        name = f"dynamo_{str(key).removeprefix('dynamo_')}"
        if name not in served and value is False:  # `accelerate config` writes what is switched off
            continue
        if name not in served:
            raise UserError(f"{what}.{key} is not served")
        upper = name == "dynamo_backend" and isinstance(value, str)
        chosen[name] = convert(served[name], value.upper() if upper else value, f"{what}.{key}")
    return chosen


def wished_compiler(config: AccelerateConfig, environ: Mapping[str, str]) -> str | None:
    """Give the backend that is to compile the model: the config's, else that of an outer `accelerate launch`."""
    outer = environ.get("ACCELERATE_DYNAMO_BACKEND", "").upper()
    wish = outer if config.path is None else config.dynamo_backend
    return wish if wish in _COMPILERS else None


def has_outer_launcher(environ: Mapping[str, str]) -> bool:
    """Tell whether `accelerate launch` or torchrun started this process: then OMP_NUM_THREADS=1 is nobody's wish."""
    return LAUNCHED not in environ and ("ACCELERATE_MIXED_PRECISION" in environ or "TORCHELASTIC_RUN_ID" in environ)


def wants_cpu(config: AccelerateConfig, environ: Mapping[str, str]) -> bool:
    """Tell whether the CPU is asked for: by the config, or by `ACCELERATE_USE_CPU`.

    What `accelerate launch` put there does not count where a config was typed: it speaks of the outer world.
    """
    outer = environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    return config.use_cpu or (outer and (config.path is None or "ACCELERATE_MIXED_PRECISION" not in environ))


def with_processes(config: AccelerateConfig, typed: int | None, world: World) -> AccelerateConfig:
    """Lay a typed number of processes over a config.

    Raises UserError where processes are to be started, and a config of several machines contradicts it.
    """
    if typed is None:
        return config
    if world.launcher == "none" and config.num_machines > 1 and typed != config.num_processes:
        raise UserError(
            f"--num-processes {typed} and {config.path} ({config.num_processes} on {config.num_machines} machines)"
            " contradict each other: leave out --num-processes"
        )
    return replace(config, num_processes=typed, processes_typed=True)


def processes_to_start(world: World, config: AccelerateConfig) -> int:
    """Give how many processes are asked for; 1 where this one is to do it, or where those of a world are there."""
    return config.num_processes if world.launcher == "none" else 1


def other_count_note(world: World, config: AccelerateConfig) -> str | None:
    """Say which number of processes counts, where the outside and the config or the flag name different ones."""
    count, says_nothing = config.num_processes, config.path is None and not config.processes_typed
    if world.launcher == "none" or count == world.size or says_nothing:
        return None
    who = "Slurm" if world.launcher == "slurm" else "WORLD_SIZE"
    what = f"--num-processes {count}" if config.processes_typed else f"{config.path} ({count} processes)"
    there = "is one process" if world.size == 1 else f"are {world.size} processes"
    return f"{who} says that there {there}: that counts, and not {what}"


def world_to_come(world: World, config: AccelerateConfig) -> World:
    """Give the world in which a command would run: this one, or the one that would be started, as rank 0 sees it."""
    count = processes_to_start(world, config)
    return world if count == 1 else World(size=count, local_size=count // config.num_machines, launcher="torchrun")


def started_line(world: World, config: AccelerateConfig) -> str:
    """Say in words which processes would be started."""
    count, machines = processes_to_start(world, config), config.num_machines
    if count > 1:
        where = "here" if machines == 1 else f"on each of {machines} machines"
        return f"{count // machines} processes {where}"
    if world.size > 1:
        return f"nothing more: this is rank {world.rank} of {world.size} processes, started by {world.launcher}"
    return "one process: this one"
