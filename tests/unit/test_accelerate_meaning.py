"""An Accelerate config means the same by `--config` and under `accelerate launch`, or a note or a refusal says why."""

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from cifar_dist.config.accelerate_config import (
    AccelerateConfig,
    load_accelerate_config,
    precision_requested,
    requested_compiler,
)
from cifar_dist.config.errors import UserError
from cifar_dist.config.world import World
from cifar_dist.runtime import device
from cifar_dist.runtime.device import DeviceFacts
from cifar_dist.runtime.launch import child_environment

SINGLE, MULTI = "distributed_type: 'NO'\n", "distributed_type: MULTI_GPU\nnum_processes: 2\nmain_process_port: 0\n"


def both_ways(folder, text: str) -> tuple[str, dict[str, str]]:
    """A config file, and the environment in which `accelerate launch --config_file` starts a script by it."""
    file = folder / "world.yaml"
    file.write_text(text)
    options, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(file), "x.py"]))
    if options.multi_gpu or options.use_fsdp:
        environ = prepare_multi_gpu_env(options) | {"WORLD_SIZE": "2"}
    else:
        environ = prepare_simple_launcher_cmd_env(options)[1]
    return str(file), environ


@pytest.mark.parametrize(
    ("text", "precision", "compiler", "mode"),
    [
        (SINGLE, "auto", None, None),
        (MULTI, "auto", None, None),
        (SINGLE + "mixed_precision: bf16", "bf16", None, None),
        (SINGLE + "fp16: true", "fp16", None, None),
        (MULTI + "fp16: true\nmixed_precision: bf16", "bf16", None, None),
        (SINGLE + "fp16: false\ndynamo_backend: 'NO'", "auto", None, None),
        (SINGLE + "dynamo_backend: INDUCTOR", "auto", "INDUCTOR", None),
        (MULTI + "dynamo_config: {dynamo_backend: INDUCTOR, dynamo_mode: max-autotune}", "auto", "INDUCTOR",
         "max-autotune"),
    ],
)  # fmt: skip
def test_what_is_served_means_the_same(tmp_path, text, precision, compiler, mode):
    path, environ = both_ways(tmp_path, text)
    for config, around in ((load_accelerate_config(path), {}), (load_accelerate_config(None, environ), environ)):
        assert (precision_requested(None, config, around), requested_compiler(config, around)) == (precision, compiler)
        assert config.dynamo_mode in (mode, "default" if mode is None else mode)
        assert config.notes == ()


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        (
            "distributed_type: FSDP\nnum_processes: 2\nmain_process_port: 0\n",
            "distributed_type must be one of NO, MULTI_",
        ),
        (MULTI + "parallelism_config: {parallelism_config_tp_size: 2}", "parallelism_config is not served"),
        (SINGLE + "dynamo_config: {dynamo_backend: INDUCTOR, dynamo_use_fullgraph: true}", "fullgraph is not served"),
        (SINGLE + "dynamo_backend: TENSORRT", "dynamo_backend must be one of NO, EAGER,"),
    ],
)
def test_what_is_not_served_is_refused_both_ways(tmp_path, text, refusal):
    path, environ = both_ways(tmp_path, text)
    with pytest.raises(UserError, match=f"world.yaml: .*{refusal}"):
        load_accelerate_config(path)
    with pytest.raises(UserError, match=f"^accelerate launch: .*{refusal}"):
        load_accelerate_config(None, environ)
    assert load_accelerate_config(str(both_ways(tmp_path, SINGLE)[0]), environ).notes == (), "a typed config counts"


@pytest.mark.parametrize(
    ("environ", "refusal"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "not 'DEEPSPEED'"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "not 'MEGATRON_LM'"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision must be one of no, fp16, bf16, not 'fp8'"),
    ],
)
def test_so_is_what_needs_packages_to_be_started(environ, refusal):
    with pytest.raises(UserError, match=f"^accelerate launch: .*{refusal}"):
        load_accelerate_config(None, environ)


def test_several_processes_of_a_type_that_starts_one(tmp_path):
    """Accelerate starts one process for NO, and for MULTI_CPU one unless mpirun is there."""
    path, environ = both_ways(tmp_path, SINGLE + "num_processes: 2")
    with pytest.raises(UserError, match="distributed_type 'NO' is one process: write MULTI_GPU for several"):
        load_accelerate_config(path)
    assert "accelerate launch started one process" in load_accelerate_config(None, environ).notes[0]
    path, environ = both_ways(tmp_path, "distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    assert load_accelerate_config(path).num_processes == 2
    assert "accelerate launch started one process" in load_accelerate_config(None, environ).notes[0]


def test_sagemaker_is_refused_before_its_keys_are_unknown(tmp_path):
    file = tmp_path / "cloud.yaml"
    file.write_text("compute_environment: AMAZON_SAGEMAKER\nec2_instance_type: x\ndistributed_type: 'NO'\n")
    with pytest.raises(UserError, match="compute_environment must be one of LOCAL_MACHINE, not 'AMAZON_SAGEMAKER'"):
        load_accelerate_config(str(file))


def test_ignored_keys_are_named_in_one_note(tmp_path):
    asked = MULTI + "debug: true\nenable_cpu_affinity: true\n"
    path, environ = both_ways(tmp_path, asked)
    said = "ignored here: debug, enable_cpu_affinity"
    assert load_accelerate_config(None, environ | {"ACCELERATE_CPU_AFFINITY": "1"}).notes == (
        f"accelerate launch: {said}",
    )
    assert load_accelerate_config(path).notes == (f"Accelerate config {path}: {said}",)
    path, _ = both_ways(
        tmp_path, asked + "fp8_config: {backend: TE}\nrdzv_backend: c10d\nmpirun_config: {mpirun_ccl: 1}\n"
    )
    assert load_accelerate_config(path).notes[0].endswith(f"{said}, fp8_config, mpirun_config, rdzv_backend")


def test_what_accelerate_config_writes_unasked_gives_no_note(tmp_path):
    path, environ = both_ways(
        tmp_path,
        "compute_environment: LOCAL_MACHINE\ndebug: false\ndistributed_type: MULTI_GPU\ndowncast_bf16: 'no'\n"
        "enable_cpu_affinity: false\ngpu_ids: all\nmachine_rank: 0\nmain_training_function: main\nnum_machines: 1\n"
        "num_processes: 2\nrdzv_backend: static\nsame_network: true\ntpu_env: []\ntpu_use_cluster: false\n"
        "tpu_use_sudo: false\nuse_cpu: false\nmain_process_port: 0\n",
    )
    assert load_accelerate_config(path).notes == load_accelerate_config(None, environ).notes == ()
    assert load_accelerate_config(None, {}) == AccelerateConfig()


def choose(config, environ, monkeypatch, capability=(8, 0), **typed):
    monkeypatch.setattr(device, "probe", lambda **_: DeviceFacts(type="cuda", cuda_capability=capability))
    return device.choose_compute(config, environ, World(), **typed)


def test_mixed_precision_no_is_float32_by_config_and_noted_under_accelerate_launch(tmp_path, monkeypatch):
    """The variable is `no` where nobody asked, too: `accelerate launch launch.py` is not to be slow in silence."""
    path, environ = both_ways(tmp_path, SINGLE + "mixed_precision: 'no'\n")
    by_config, outer = load_accelerate_config(path), load_accelerate_config(None, environ)
    compute = choose(by_config, {}, monkeypatch)
    assert (compute.precision, compute.notes) == ("no", ())
    compute = choose(outer, environ, monkeypatch)
    assert compute.precision == "bf16"
    assert [note for note in compute.notes if "--precision no for float32" in note]
    assert choose(outer, environ, monkeypatch, requested_precision="bf16").notes == ()
    assert choose(by_config, environ, monkeypatch).precision == "no", "a typed config counts"
    assert choose(outer, environ, monkeypatch, capability=(6, 0)).notes == ()


def test_notes_reach_the_user(tmp_path, monkeypatch):
    config = AccelerateConfig(notes=("x.yaml: ignored here: debug",))
    assert "x.yaml: ignored here: debug" in choose(config, {}, monkeypatch).notes


def test_what_compiles_is_handed_down_to_processes_that_are_started():
    environ = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "max-autotune"}
    child = child_environment(environ, load_accelerate_config(None, environ), 2)
    assert environ.items() <= child.items()
