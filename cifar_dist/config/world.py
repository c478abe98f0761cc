"""The world: who runs beside us, read once from the environment, and what an Accelerate config asks for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cifar_dist.config.errors import UserError
from cifar_dist.config.loading import read_yaml
from cifar_dist.config.parsing import nearest

Precision = Literal["auto", "no", "fp16", "bf16"]

# What `accelerate launch --config_file` reads; another key is a ValueError there, so it is refused here too.
_ACCELERATE_KEYS = frozenset(
    """
    compute_environment debug deepspeed_config distributed_type downcast_bf16 dynamo_config enable_cpu_affinity
    fp8_config fsdp_config gpu_ids ipex_config machine_rank main_process_ip main_process_port main_training_function
    megatron_lm_config mixed_precision mpirun_config num_machines num_processes parallelism_config rdzv_backend
    same_network tpu_env tpu_use_cluster tpu_use_sudo use_cpu
    """.split()
)


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The processes of this run, this one's place among them, and who started them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: Literal["none", "torchrun", "slurm"] = "none"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "World":
        """Read `WORLD_SIZE` and its companions, or a Slurm task's variables; anything else is a world of one.

        A `salloc` shell has `SLURM_*` too but is no task: without `SLURM_STEP_ID` it is a world of one.
        Raises UserError where a variable is not a number or the rank is outside the world.
        """
        if "WORLD_SIZE" in environ:
            return cls._read(environ, "RANK", "WORLD_SIZE", "LOCAL_RANK", "torchrun")
        if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
            return cls._read(environ, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "slurm")
        return cls()

    @classmethod
    def _read(
        cls, environ: Mapping[str, str], rank: str, size: str, local_rank: str, launcher: Literal["torchrun", "slurm"]
    ) -> "World":
        numbers = {}
        for name, default in ((rank, "0"), (size, "1"), (local_rank, "0")):
            text = environ.get(name, default)
            if not text.isdecimal():
                raise UserError(f"the environment variable {name} must be a number, not '{text}'")
            numbers[name] = int(text)
        if not numbers[rank] < numbers[size]:
            raise UserError(f"{rank}={numbers[rank]} is outside a world of {size}={numbers[size]}")
        if numbers[size] == 1:
            return cls()
        return cls(rank=numbers[rank], size=numbers[size], local_rank=numbers[local_rank], launcher=launcher)


@dataclass(frozen=True, kw_only=True, slots=True)
class AccelerateConfig:
    """What an Accelerate config file (or its absence) asks of the world."""

    path: str | None = None
    num_processes: int = 1
    num_machines: int = 1
    use_cpu: bool = False
    """True: the CPU. False: the best accelerator there is."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """None where the file does not say."""


def load_accelerate_config(path: str | None) -> AccelerateConfig:
    """Read an Accelerate config file; without one, ask for one process on the best device. Raises UserError."""
    if path is None:
        return AccelerateConfig()
    values = read_yaml(Path(path), "Accelerate config")
    for key in values:
        if key not in _ACCELERATE_KEYS:
            hint = nearest(key, _ACCELERATE_KEYS) or "; hyperparameters belong in a recipe"
            raise UserError(f"Accelerate config {path} has the unknown key '{key}'{hint}")
    if values.get("distributed_type") == "MPS":
        raise UserError(f"Accelerate config {path}: write distributed_type: 'NO' for a Mac (accelerate refuses MPS)")
    return AccelerateConfig(
        path=path,
        num_processes=_number(values, "num_processes", path),
        num_machines=_number(values, "num_machines", path),
        use_cpu=_flag(values, "use_cpu", path),
        mixed_precision=_mixed_precision(values.get("mixed_precision"), path),
    )


def wished_precision(typed: str | None, config: AccelerateConfig, environ: Mapping[str, str]) -> str:
    """Give the precision asked for: the flag, else the config, else the outer environment, else `auto`.

    `ACCELERATE_MIXED_PRECISION=no` is what `accelerate launch` sets when nobody asked for anything: it does not count.
    """
    outer = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return typed or config.mixed_precision or (outer if outer in ("fp16", "bf16") else "auto")


def _number(values: Mapping[str, Any], key: str, path: str) -> int:
    value = values.get(key, 1)
    if type(value) is not int or value < 1:
        raise UserError(f"Accelerate config {path}: {key} must be a whole number, 1 or more, not {value!r}")
    return value


def _flag(values: Mapping[str, Any], key: str, path: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"Accelerate config {path}: {key} must be true or false, not {value!r}")
    return value


def _mixed_precision(value: Any, path: str) -> Literal["no", "fp16", "bf16"] | None:
    if value is None or value in ("no", "fp16", "bf16"):
        return value  # type: ignore[no-any-return]
    quoted = " (quote it: unquoted no is a YAML boolean)" if value is False else ""
    raise UserError(f"Accelerate config {path}: mixed_precision must be 'no', 'fp16' or 'bf16', not {value!r}{quoted}")
