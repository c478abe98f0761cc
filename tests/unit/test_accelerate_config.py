"""An Accelerate config means the same by `--config` and under `accelerate launch`, or a note or a refusal says why."""

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from cifar_dist.config.accelerate_config import (
    AccelerateConfig,
    cpu_requested,
    load_accelerate_config,
    precision_requested,
    process_count_note,
    processes_to_start,
    with_processes,
)
from cifar_dist.config.errors import UserError
from cifar_dist.config.world import World
from cifar_dist.runtime import device
from cifar_dist.runtime.device import DeviceFacts
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
ALONE, OUTER = World(), World(size=2, local_size=2, launcher="torchrun")
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
        assert (precision_requested(None, config, around), config.compiler) == (precision, compiler)
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


def test_who_starts_processes():
    two = AccelerateConfig(path="two.yaml", num_processes=2)
    assert processes_to_start(ALONE, AccelerateConfig()) == 1
    assert processes_to_start(ALONE, two) == 2
    assert processes_to_start(ALONE, with_processes(two, None, ALONE)) == 2
    assert processes_to_start(ALONE, with_processes(two, 3, ALONE)) == 3
    assert processes_to_start(ALONE, with_processes(AccelerateConfig(), 3, ALONE)) == 3
    assert processes_to_start(OUTER, with_processes(two, 3, OUTER)) == 1, "that world is there already"
    assert processes_to_start(World(launcher="torchrun"), two) == 1, "WORLD_SIZE=1 is a world too"
    nodes = AccelerateConfig(path="n.yaml", num_processes=8, num_machines=2)
    assert with_processes(nodes, 8, ALONE).num_processes == 8
    assert with_processes(nodes, 4, OUTER).num_processes == 4, "nothing is started"
    with pytest.raises(UserError, match="contradict each other"):
        with_processes(nodes, 4, ALONE)


def test_one_line_says_which_number_of_processes_counts():
    four = AccelerateConfig(path="four.yaml", num_processes=4)
    says = "WORLD_SIZE says 2 processes: that counts, and not "
    assert process_count_note(OUTER, four) == says + "four.yaml (4 processes)"
    assert process_count_note(OUTER, with_processes(four, 3, OUTER)) == says + "--num-processes 3"
    assert process_count_note(OUTER, with_processes(AccelerateConfig(), 1, OUTER)) == says + "--num-processes 1"
    agreed = [(OUTER, with_processes(four, 2, OUTER)), (OUTER, AccelerateConfig()), (ALONE, four)]
    assert [process_count_note(*each) for each in agreed] == [None] * 3
    assert process_count_note(World(size=2, launcher="slurm"), four).startswith("Slurm started 2 processes")
    assert "WORLD_SIZE says 1 process:" in process_count_note(World(launcher="torchrun"), four)


@pytest.mark.parametrize(
    ("environ", "path", "wanted"),
    [
        ({}, None, False),
        ({"ACCELERATE_USE_CPU": "true"}, None, True),
        ({"ACCELERATE_USE_CPU": "true"}, "x.yaml", True),  # typed before torchrun: the user's word
        ({"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}, None, True),  # accelerate launch --cpu
        ({"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}, "x.yaml", False),
        ({"ACCELERATE_USE_CPU": "False"}, None, False),
    ],
)
def test_who_asks_for_the_cpu(environ, path, wanted):
    assert cpu_requested(AccelerateConfig(path=path), environ) is wanted
    assert cpu_requested(AccelerateConfig(path=path, use_cpu=True), environ)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_is_a_genuine_accelerate_config(path):
    theirs, ours = load_config_from_file(str(path)), load_accelerate_config(str(path))
    counts = {"multi_cpu": (2, 1), "multi_gpu": (2, 1), "multi_node": (8, 2)}.get(path.stem, (1, 1))
    assert (theirs.num_processes, theirs.num_machines) == (ours.num_processes, ours.num_machines) == counts
    assert theirs.use_cpu == ours.use_cpu == (path.stem in ("cpu", "multi_cpu"))
    assert ours.mixed_precision is None
    comment = path.read_text().split("compute_environment")[0]
    assert f"python launch.py --config accelerate_configs/{path.name}" in comment
    assert "accelerate launch" in comment


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 3", "unknown key 'epochs'"),
        ("use_cpuu: true", "unknown key 'use_cpuu', did you mean 'use_cpu'?"),
        ("distributed_type: NO", "quote it"),
        ("dynamo_config: {dynamo_backend: false}", "quote it"),
        ("dynamo_config: INDUCTOR", "dynamo_config must be a mapping, not 'INDUCTOR'"),
        ("gpu_ids: [0, 1]", "gpu_ids must be text, not [0, 1]"),
        ("num_processes: -1", "num_processes must be 1 or more, not -1"),
        ("num_processes: 3\nnum_machines: 2", "num_processes=3 of all machines does not divide by"),
        ("num_processes: 4\nnum_machines: 2", "several machines need main_process_ip"),
        ("num_processes: 4\nnum_machines: 2\nmachine_rank: 2", "machine_rank=2 must be below num_machines=2"),
    ],
)
def test_a_bad_config_is_refused(tmp_path, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as refusal:
        load_accelerate_config(str(file))
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("typed", "config", "outer", "precision"),
    [
        ("no", "fp16", "bf16", "no"), (None, "fp16", "bf16", "fp16"), (None, None, "bf16", "bf16"),
        (None, None, "no", "auto"), (None, None, None, "auto"),
    ],
)  # fmt: skip
def test_the_flag_wins_over_the_config_over_the_environment(typed, config, outer, precision):
    environ = {} if outer is None else {"ACCELERATE_MIXED_PRECISION": outer}
    assert precision_requested(typed, AccelerateConfig(mixed_precision=config), environ) == precision


def test_the_config_says_what_compiles_else_the_environment(tmp_path):
    file, outer = tmp_path / "config.yaml", {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
    switched_off = ", ".join(f"dynamo_use_{what}: false" for what in ("dynamic", "fullgraph", "regional_compilation"))
    file.write_text(f"dynamo_config: {{dynamo_backend: inductor, {switched_off}}}")  # as `accelerate config` writes it
    assert load_accelerate_config(str(file), {}).compiler == "INDUCTOR"
    file.write_text("use_cpu: true")
    assert load_accelerate_config(str(file), outer).compiler is None
    assert load_accelerate_config(None, outer).compiler == "INDUCTOR"
