"""The world is read once; the plan is arithmetic."""

from dataclasses import replace

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from cifar_dist.config.accelerate_config import (
    AccelerateConfig,
    cpu_requested,
    load_accelerate_config,
    planned_world,
    precision_requested,
    process_count_note,
    processes_to_start,
    requested_compiler,
    with_processes,
)
from cifar_dist.config.errors import UserError
from cifar_dist.config.options import TrainOptions
from cifar_dist.config.plan import KNOWN_SIZES, DatasetSizes, fit_to_dataset, make_plan
from cifar_dist.config.world import World, first_host
from cifar_dist.run.directory import RunDirectory
from cifar_dist.run.resolve import check_before_launch
from tests.conftest import ROOT, make_recipe
from tests.runs import make_metadata

CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


SLURM = {"SLURM_STEP_ID": "2", "SLURM_JOB_ID": "71", "SLURM_STEP_NODELIST": "gpu[07-09,12]"}


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        ({}, World()),
        ({"WORLD_SIZE": "1", "RANK": "0"}, World(launcher="torchrun")),
        (
            {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            World(rank=3, size=4, local_rank=1, local_size=2, launcher="torchrun"),
        ),
        (
            {**SLURM, "SLURM_PROCID": "4", "SLURM_NTASKS": "5", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}
            | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1"},
            World(
                rank=4, size=5, local_rank=0, local_size=1, launcher="slurm",
                main_address="gpu07", main_port=12_000 + 71 * 31 + 2,
            ),
        ),
        (
            {**SLURM, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "MASTER_ADDR": "a"}
            | {"SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_PORT": "1234"},
            World(rank=1, size=2, local_rank=1, local_size=2, launcher="slurm"),
        ),
        (
            {**SLURM, "SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
            | {"SLURM_STEP_TASKS_PER_NODE": "1,3", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            World(rank=2, size=4, local_rank=1, local_size=3, launcher="slurm"),
        ),
        ({**SLURM, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, World()),  # one task may start processes itself
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "3"}, World()),  # a salloc shell is no task
        ({**SLURM, "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, World()),  # nor is this one
    ],
)  # fmt: skip
def test_the_world_is_read_from_the_environment(environ, world):
    assert World.from_environment(environ) == world


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"), ("n[1-2]", "n1"), ("gpu[003-005,9],cpu1", "gpu003"), ("a,b[1-2]", "a"),
        ("rack[1-2]-x,b", "rack1-x"), ("", ""),
    ],
)  # fmt: skip
def test_the_first_host_of_a_slurm_step(nodelist, host):
    assert first_host(nodelist) == host


@pytest.mark.parametrize(
    "environ",
    [
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "-1"},
        {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"},  # would wait without a word
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},  # ranks would not agree on how many share a machine
        {"OMPI_COMM_WORLD_SIZE": "2"},  # two worlds of one
    ],
)
def test_a_broken_world_is_refused(environ):
    with pytest.raises(UserError, match=r"RANK|WORLD_SIZE"):
        World.from_environment(environ)


ALONE, OUTER = World(), World(size=2, local_size=2, launcher="torchrun")


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
    says = "WORLD_SIZE says that there are 2 processes: that counts, and not "
    assert process_count_note(OUTER, four) == says + "four.yaml (4 processes)"
    assert process_count_note(OUTER, with_processes(four, 3, OUTER)) == says + "--num-processes 3"
    assert process_count_note(OUTER, with_processes(AccelerateConfig(), 1, OUTER)) == says + "--num-processes 1"
    agreed = [(OUTER, with_processes(four, 2, OUTER)), (OUTER, AccelerateConfig()), (ALONE, four)]
    assert [process_count_note(*each) for each in agreed] == [None] * 3
    assert process_count_note(World(size=2, launcher="slurm"), four).startswith("Slurm says")
    assert "says that there is one process:" in process_count_note(World(launcher="torchrun"), four)


def test_the_world_to_come():
    nodes = AccelerateConfig(path="n.yaml", num_processes=8, num_machines=2)
    assert planned_world(ALONE, nodes) == World(size=8, local_size=4, launcher="torchrun")
    assert planned_world(ALONE, AccelerateConfig()) == ALONE
    assert planned_world(OUTER, nodes) == OUTER


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


def test_the_folder_holds_the_configs():
    assert [path.stem for path in CONFIGS] == ["cpu", "mps", "multi_cpu", "multi_gpu", "multi_node", "single_gpu"]


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
        ("distributed_type: FSDP", "must be one of NO, MULTI_GPU, MULTI_CPU, not 'FSDP'"),
        ("dynamo_config: {dynamo_backend: FX2TRT}", "dynamo_backend must be one of NO, EAGER,"),
        ("dynamo_config: {dynamo_use_fullgraph: true}", "dynamo_use_fullgraph is not served"),
        ("dynamo_config: {dynamo_backend: false}", "quote it"),
        ("dynamo_config: INDUCTOR", "dynamo_config must be a mapping, not 'INDUCTOR'"),
        ("gpu_ids: [0, 1]", "gpu_ids must be text, not [0, 1]"),
        ("mixed_precision: fp8", "must be one of no, fp16, bf16"),
        ("num_processes: -1", "num_processes must be 1 or more, not -1"),
        ("num_processes: two", "num_processes must be a whole number, not 'two'"),
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


def test_a_missing_config_is_named():
    with pytest.raises(UserError, match=r"cannot read Accelerate config no-such\.yaml"):
        load_accelerate_config("no-such.yaml")


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
    file.write_text("dynamo_config: {dynamo_backend: inductor, dynamo_mode: max-autotune}")
    config = load_accelerate_config(str(file))
    assert (requested_compiler(config, {}), config.dynamo_mode) == ("INDUCTOR", "max-autotune")
    switched_off = ", ".join(f"dynamo_use_{what}: false" for what in ("dynamic", "fullgraph", "regional_compilation"))
    file.write_text(f"dynamo_config: {{dynamo_backend: INDUCTOR, {switched_off}}}")  # as `accelerate config` writes it
    assert load_accelerate_config(str(file)).dynamo_backend == "INDUCTOR"
    file.write_text("use_cpu: true")
    assert requested_compiler(load_accelerate_config(str(file)), outer) is None
    assert requested_compiler(AccelerateConfig(), outer) == "INDUCTOR"
    assert requested_compiler(AccelerateConfig(), {"ACCELERATE_DYNAMO_BACKEND": "no"}) is None
    assert requested_compiler(AccelerateConfig(), {}) is None


def test_the_plan_of_the_original():
    plan = make_plan(make_recipe(), world_size=1, sizes=KNOWN_SIZES["cifar10"], device_type="cpu")
    assert plan.equation == "global_batch_size 128 = 128 per device x 1 process x 1 accumulation"
    assert (plan.steps_per_epoch, plan.images_per_epoch, plan.total_steps) == (391, 50_000, 391 * 800)
    assert plan.lines["images"] == "50,000 training, 0 validation, 10,000 test"
    assert plan.lines["steps"] == "391 an epoch x 800 epochs = 312,800"
    assert replace(plan, epochs=1).lines["steps"] == "391 an epoch x 1 epoch = 391"


def test_the_batch_is_cut_by_the_world():
    sizes = DatasetSizes(num_train=5_000, num_test=10)
    plan = make_plan(make_recipe("gradient_accumulation_steps=2"), world_size=4, sizes=sizes, device_type="cuda")
    assert (
        plan.equation
        == "global_batch_size 128 = 16 per device x 4 processes x 2 accumulation; BatchNorm sees 64 at a time"
    )
    with pytest.raises(UserError) as refusal:
        make_plan(make_recipe(), world_size=3, sizes=sizes, device_type="cpu")
    assert str(refusal.value).endswith("does not divide by 3 processes x 1 accumulation: set it to 126 or 129")


def test_batch_norm_groups_lie_whole_on_one_rank():
    sizes, recipe = DatasetSizes(num_train=5_000, num_test=10), make_recipe("batch_norm_group_size=32")
    for world_size in (1, 2, 4):
        plan = make_plan(recipe, world_size=world_size, sizes=sizes, device_type="cpu")
        assert plan.batch_norm_groups == 4
        assert plan.equation.endswith("BatchNorm sees 32 at a time")
    with pytest.raises(UserError, match=r"divide by 8 processes: set it to null or one of: 2, 4, 8, 16$"):
        make_plan(recipe, world_size=8, sizes=sizes, device_type="cpu")
    halved = make_recipe("batch_norm_group_size=32", "gradient_accumulation_steps=2")
    assert make_plan(halved, world_size=2, sizes=sizes, device_type="cpu").batch_norm_groups == 2
    with pytest.raises(UserError, match="batch_norm_group_size=48 must cut the 128 images"):
        make_plan(make_recipe("batch_norm_group_size=48"), world_size=1, sizes=sizes, device_type="cpu")
    assert make_plan(make_recipe(), world_size=4, sizes=sizes, device_type="cpu").batch_norm_groups == 1


@pytest.mark.parametrize(("num_train", "steps", "used"), [(256, 2, 256), (257, 2, 256), (258, 3, 258), (100, 1, 100)])
def test_a_last_batch_of_one_image_is_left_out(num_train, steps, used):
    sizes = DatasetSizes(num_train=num_train, num_test=1)
    plan = make_plan(make_recipe("epochs=1"), world_size=1, sizes=sizes, device_type="cpu")
    assert (plan.steps_per_epoch, plan.images_per_epoch) == (steps, used)
    assert ("1 image left out of each" in plan.lines["steps"]) == (used != num_train)


def test_auto_holds_out_a_tenth_and_at_most_5000():
    recipe = make_recipe(base="standard")
    shapes, cifar = KNOWN_SIZES["shapes"], KNOWN_SIZES["cifar10"]
    assert fit_to_dataset(recipe, shapes).validation_size == 500
    assert fit_to_dataset(recipe, cifar).validation_size == 5_000
    typed = make_recipe("validation_size=2000", base="standard")
    assert fit_to_dataset(typed, shapes).validation_size == 2_000
    with pytest.raises(UserError, match="set it to at most 4990"):
        fit_to_dataset(make_recipe("validation_size=5000"), shapes)


def test_a_split_that_stopping_needs_and_that_has_no_image_is_refused():
    recipe = make_recipe("validation_size=auto", "early_stopping.monitor=val_loss")
    with pytest.raises(UserError, match="of 8 training images none is held out"):
        fit_to_dataset(recipe, DatasetSizes(num_train=8, num_test=4))


def test_another_machine_asks_nothing_of_a_run_that_is_not_there(tmp_path):
    """It would check, and download the data of, a run that nobody has asked for."""
    options = TrainOptions(resume=True, resume_dir=tmp_path / "run")
    assert check_before_launch(options, world_size=6, machine_rank=1) is None
    with pytest.raises(UserError, match="there is no run in"):
        check_before_launch(options, world_size=6)
    (tmp_path / "run").mkdir()
    RunDirectory(tmp_path / "run").write_metadata(make_metadata(recipe=make_recipe("global_batch_size=96")))
    request = check_before_launch(options, world_size=6, machine_rank=1)
    assert (request.dataset, request.recipe.global_batch_size) == ("shapes", 96)
    new = TrainOptions(run_dir=tmp_path / "run", dataset="shapes", recipe="original")
    assert check_before_launch(new, world_size=4, machine_rank=1).dataset == "shapes"
