"""What an Accelerate config asks for, and what that means beside the processes that are there and the environment."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cifar_dist.config.errors import UserError
from cifar_dist.config.loading import read_yaml
from cifar_dist.config.parsing import nearest
from cifar_dist.config.world import World

# What `accelerate launch --config_file` reads; another key is a ValueError there, so it is refused here too.
_ACCELERATE_KEYS = frozenset(
    """
    compute_environment debug deepspeed_config distributed_type downcast_bf16 dynamo_config enable_cpu_affinity
    fp8_config fsdp_config gpu_ids ipex_config machine_rank main_process_ip main_process_port main_training_function
    megatron_lm_config mixed_precision mpirun_config num_machines num_processes parallelism_config rdzv_backend
    same_network tpu_env tpu_use_cluster tpu_use_sudo use_cpu
    """.split()
)

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


def load_accelerate_config(path: str | None) -> AccelerateConfig:
    """Read an Accelerate config file; without one, ask for one process on the best device. Raises UserError."""
    if path is None:
        return AccelerateConfig()
    values = read_yaml(Path(path), "Accelerate config")
    for key in values:
        if key not in _ACCELERATE_KEYS:
            hint = nearest(key, _ACCELERATE_KEYS) or "; hyperparameters belong in a recipe"
            raise UserError(f"Accelerate config {path} has the unknown key '{key}'{hint}")
    kind = values.get("distributed_type", "NO")
    if kind == "MPS":
        raise UserError(f"Accelerate config {path}: write distributed_type: 'NO' for a Mac (accelerate refuses MPS)")
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        quoted = " (quote it: unquoted NO is a YAML boolean)" if kind is False else ""
        raise UserError(
            f"Accelerate config {path}: distributed_type must be 'NO', 'MULTI_GPU' or 'MULTI_CPU', not {kind!r}{quoted}"
        )
    config = AccelerateConfig(
        path=path,
        num_processes=_number(values, "num_processes", path),
        num_machines=_number(values, "num_machines", path),
        machine_rank=_number(values, "machine_rank", path, default=0),
        main_process_ip=values.get("main_process_ip"),
        main_process_port=_number(values, "main_process_port", path) if values.get("main_process_port") else None,
        use_cpu=_flag(values, "use_cpu", path),
        gpu_ids=_gpu_ids(values.get("gpu_ids"), path),
        mixed_precision=_mixed_precision(values.get("mixed_precision"), path),
        **_dynamo(values.get("dynamo_config"), path),
    )
    _check_machines(config)
    return config


def _check_machines(config: AccelerateConfig) -> None:
    machines, processes = config.num_machines, config.num_processes
    if processes % machines:
        raise UserError(
            f"Accelerate config {config.path}: num_processes={processes} (of all machines together) does not divide by"
            f" num_machines={machines}"
        )
    if config.machine_rank >= machines:
        raise UserError(
            f"Accelerate config {config.path}: machine_rank={config.machine_rank} must be below num_machines={machines}"
        )
    if machines > 1 and not isinstance(config.main_process_ip, str):
        raise UserError(
            f"Accelerate config {config.path}: several machines need main_process_ip, the address of machine_rank 0"
        )


def wished_precision(typed: str | None, config: AccelerateConfig, environ: Mapping[str, str]) -> str:
    """Give the precision asked for: the flag, else the config, else the outer environment, else `auto`.

    `ACCELERATE_MIXED_PRECISION=no` is what `accelerate launch` sets when nobody asked for anything: it does not count.
    """
    outer = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return typed or config.mixed_precision or (outer if outer in ("fp16", "bf16") else "auto")


def _number(values: Mapping[str, Any], key: str, path: str, *, default: int = 1) -> int:
    """Give a whole number that is at least its default."""
    value = values.get(key, default)
    if type(value) is not int or value < default:
        raise UserError(f"Accelerate config {path}: {key} must be a whole number, {default} or more, not {value!r}")
    return value


def _flag(values: Mapping[str, Any], key: str, path: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"Accelerate config {path}: {key} must be true or false, not {value!r}")
    return value


def _gpu_ids(value: Any, path: str) -> str | None:
    if value is None or value == "all":
        return None
    if type(value) not in (int, str):
        raise UserError(f"Accelerate config {path}: gpu_ids must be like 0,1 or all, not {value!r}")
    return str(value)


def _mixed_precision(value: Any, path: str) -> Literal["no", "fp16", "bf16"] | None:
    if value is None or value in ("no", "fp16", "bf16"):
        return value
    quoted = " (quote it: unquoted no is a YAML boolean)" if value is False else ""
    raise UserError(f"Accelerate config {path}: mixed_precision must be 'no', 'fp16' or 'bf16', not {value!r}{quoted}")


def _dynamo(values: Any, path: str) -> dict[str, str]:
    """Read how the model is to be compiled. Raises UserError for what is not served."""
    choices = {"dynamo_backend": ("NO", *_COMPILERS), "dynamo_mode": ("default", "reduce-overhead", "max-autotune")}
    if not isinstance(values or {}, dict):
        raise UserError(f"Accelerate config {path}: dynamo_config must be a mapping, not {values!r}")
    chosen = {}
    for key, value in (values or {}).items():
        name = f"dynamo_{str(key).removeprefix('dynamo_')}"
        text = str(value).upper() if name == "dynamo_backend" else str(value)
        what = f"Accelerate config {path}: dynamo_config.{key}"
        if name not in choices:
            raise UserError(f"{what} is not served")
        if text not in choices[name]:
            quoted = " (quote it: unquoted NO is a YAML boolean)" if value is False else ""
            raise UserError(f"{what} must be one of {', '.join(choices[name])}, not {value!r}{quoted}")
        chosen[name] = text
    return chosen


def wished_compiler(config: AccelerateConfig, environ: Mapping[str, str]) -> str | None:
    """Give the backend that is to compile the model: the config's, else that of an outer `accelerate launch`."""
    outer = environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper()
    wish = config.dynamo_backend or "NO" if config.path is not None else outer
    return wish if wish in _COMPILERS else None


def has_outer_launcher(environ: Mapping[str, str]) -> bool:
    """Tell whether `accelerate launch` or torchrun started this process: then OMP_NUM_THREADS=1 is nobody's wish."""
    return "ACCELERATE_MIXED_PRECISION" in environ or "TORCHELASTIC_RUN_ID" in environ


def wants_cpu(config: AccelerateConfig, environ: Mapping[str, str]) -> bool:
    """Tell whether the CPU is asked for: by the config, or by `ACCELERATE_USE_CPU`.

    What `accelerate launch` put there does not count where a config was typed: it speaks of the outer world.
    """
    outer = environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    return config.use_cpu or (outer and (config.path is None or "ACCELERATE_MIXED_PRECISION" not in environ))


def processes_to_start(world: World, config: AccelerateConfig, typed: int | None) -> int:
    """Give how many processes are asked for and not there yet; 1 where this one is to do it, or where others are there.

    Raises UserError where the flag and a config of several machines contradict each other.
    """
    if world.launcher != "none":
        return 1
    if typed is not None and config.num_machines > 1 and typed != config.num_processes:
        raise UserError(
            f"--num-processes {typed} and {config.path} ({config.num_processes} on {config.num_machines} machines)"
            " contradict each other: leave out --num-processes"
        )
    return typed or config.num_processes


def other_count_note(world: World, config: AccelerateConfig, typed: int | None) -> str | None:
    """Say which number of processes counts, where the outside and the config or the flag name different ones."""
    asked = typed if typed is not None else config.num_processes if config.path is not None else world.size
    if asked == world.size or world.launcher == "none":
        return None
    who = "Slurm" if world.launcher == "slurm" else "WORLD_SIZE"
    what = f"--num-processes {typed}" if typed is not None else f"{config.path} ({config.num_processes} processes)"
    return f"{who} says that there are {world.size} processes: that counts, and not {what}"


def world_to_come(world: World, config: AccelerateConfig, typed: int | None) -> World:
    """Give the world in which a command would run: this one, or the one that would be started, as rank 0 sees it."""
    count = processes_to_start(world, config, typed)
    return world if count == 1 else World(size=count, local_size=count // config.num_machines, launcher="torchrun")


def started_line(world: World, config: AccelerateConfig, typed: int | None) -> str:
    """Say in words which processes would be started."""
    count, machines = processes_to_start(world, config, typed), config.num_machines
    if count > 1:
        where = "here" if machines == 1 else f"on each of {machines} machines"
        return f"{count // machines} processes {where}, by torch.distributed.run"
    if world.size > 1:
        return f"nothing more: this is rank {world.rank} of {world.size} processes, started by {world.launcher}"
    return "one process: this one"
