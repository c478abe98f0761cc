"""What the scripts of slurm/ ask of Slurm, for jobs of every shape; a pretended srun and scontrol write it down."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

# Writes its arguments down, leaves the summary that it is told to, and ends as it is told to.
SRUN = r"""#!/usr/bin/env bash
{ printf '%s\n' srun "$@"; echo "MASTER=${MASTER_ADDR-none}:${MASTER_PORT-none}"; } >>calls
[[ "$*" != *"cp -ru"* ]] || exit "${STAGE_CODE:-0}"
if [[ -n ${SUMMARY-} ]]; then mkdir -p "$RUN" && printf '%s' "$SUMMARY" >"$RUN/summary.json"; fi
if [[ -n ${STAY-} ]]; then trap 'exit 75' USR1; touch started; while :; do sleep 0.05; done; fi
exit "${SRUN_CODE:-0}"
"""
SCONTROL = r"""#!/usr/bin/env bash
printf '%s\n' scontrol "$@" >>calls
case $1-${2-} in
  show-hostnames) [[ -z ${NO_HOSTNAMES-} ]] && printf 'gpu07\ngpu08\n' ;;
  show-job) echo "JobId=71 JobName=x BatchFlag=${BATCH_FLAG:-1} StdErr=/x StdOut=/logs/cifar-dist-71.out Power=" ;;
esac
"""
JOB = {"SLURM_JOB_ID": "71", "SLURM_JOB_NAME": "cifar-dist", "SLURM_JOB_NODELIST": "gpu[07-08]"}
PORT = 12_071


@pytest.fixture
def project(tmp_path) -> Path:
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "launch.py").write_text("")
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    return tmp_path


def begin(project: Path, script: str, *arguments: str, **env: str) -> subprocess.Popen:
    path = f"{project / 'bin'}:/usr/bin:/bin"
    spool = project.parent / "slurm_script"  # Slurm runs a copy
    shutil.copy(ROOT / "slurm" / script, spool)
    return subprocess.Popen(
        ["bash", spool, *arguments],
        cwd="/",
        env={"PATH": path, "SLURM_SUBMIT_DIR": str(project)} | JOB | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(project: Path, script: str, *arguments: str, **env: str) -> tuple[int, str, str]:
    process = begin(project, script, *arguments, **env)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def summary(**values) -> str:
    """Return what srun is told to leave as summary.json."""
    return json.dumps({"status": "interrupted", "train_seconds": 1.25} | values, indent=1)


RUN = "runs/cifar-dist-71"


def calls(project: Path, program: str) -> list[list[str]]:
    """The arguments of each call of a program."""
    found: list[list[str]] = []
    for line in (project / "calls").read_text().splitlines():
        if line in ("srun", "scontrol"):
            found.append([line])
        else:
            found[-1].append(line)
    return [words[1:] for words in found if words[0] == program]


ONE_A_NODE, TWO = "--ntasks-per-node=1 --cpus-per-task=8", "JOB_NUM_NODES=2"
SHAPES = {  # without the SLURM_ that each name begins with
    "one CPU task": ("CPUS_ON_NODE=8", f"--nodes=1 --ntasks=1 {ONE_A_NODE}"),
    "two CPU nodes": (f"{TWO} CPUS_ON_NODE=8 CPUS_PER_TASK=8", f"--nodes=2 --ntasks=2 {ONE_A_NODE}"),
    "four nodes of eight GPUs": (
        "JOB_NUM_NODES=4 GPUS_ON_NODE=8 GPUS_PER_NODE=8 CPUS_ON_NODE=64",
        "--nodes=4 --ntasks=32 --ntasks-per-node=8 --cpus-per-task=8",
    ),
    "more GPUs than CPUs": (
        "GPUS_ON_NODE=8 CPUS_ON_NODE=4",
        "--nodes=1 --ntasks=8 --ntasks-per-node=8 --overcommit --cpus-per-task=1",
    ),
    "tasks typed": (
        f"{TWO} NTASKS_PER_NODE=4 NTASKS=8 CPUS_ON_NODE=8",
        "--nodes=2 --ntasks=8 --ntasks-per-node=4 --cpus-per-task=2",
    ),
    "laid out by Slurm": (f"{TWO} NTASKS=3 CPUS_PER_TASK=2 CPUS_ON_NODE=4", "--ntasks=3 --cpus-per-task=2"),
    "GPUs of all nodes together, with their type": (
        f"{TWO} GPUS=a100:4,h100:2 GPUS_ON_NODE=4 CPUS_ON_NODE=8",
        "--ntasks=6 --gpus-per-task=1 --cpus-per-task=2",
    ),
    "a GPU a task": ("NTASKS=4 GPUS_PER_TASK=1 GPUS_ON_NODE=4 CPUS_PER_TASK=8", "--ntasks=4 --cpus-per-task=8"),
}


def slurm(words: str) -> dict[str, str]:
    return dict(f"SLURM_{word}".split("=", 1) for word in words.split())


TWO_NODES_OF_GPUS = slurm("JOB_NUM_NODES=2 GPUS_ON_NODE=4 CPUS_ON_NODE=8")


@pytest.mark.parametrize(("env", "layout"), SHAPES.values(), ids=SHAPES.keys())
def test_the_tasks_of_a_job(project, env, layout):
    code, out, err = run(project, "train.sh", "--recipe", "strong", "--set", "a=1", "b=2", **slurm(env))
    assert (code, err) == (0, "")
    assert out == f"run directory {project}/runs/cifar-dist-71, log /logs/cifar-dist-71.out\n"
    launch = "python launch.py --recipe strong --set a=1 b=2 --run-dir runs/cifar-dist-71 --resume"
    assert calls(project, "srun") == [
        [*layout.split(), "--kill-on-bad-exit=1", *launch.split(), f"MASTER=gpu07:{PORT}"]
    ]
    assert calls(project, "scontrol") == [["show", "hostnames", "gpu[07-08]"], ["show", "job", "-o", "71"]]


def test_without_scontrol_the_processes_find_the_node_themselves(project):
    code, _, _ = run(project, "train.sh", NO_HOSTNAMES="1")
    assert code == 0
    assert calls(project, "srun")[0][-1] == "MASTER=none:none"


@pytest.mark.parametrize(
    ("typed", "run_dir"),
    [
        ("--run-dir mine", "mine"), ("--run-dir=mine --seed 1", "mine"), ("--resume mine", "mine"),
        ("train --resume --seed 1", "runs/cifar-dist-71"), ("--seed 1 --resume", "runs/cifar-dist-71"),
    ],
)  # fmt: skip
def test_a_run_directory_that_was_typed(project, typed, run_dir):
    assert run(project, "train.sh", *typed.split())[0] == 0
    (words,) = calls(project, "srun")
    start = words.index("launch.py")
    rest = [word for word in typed.split() if word in ("train", "--seed", "1")]
    assert words[start + 1 : -1] == [*rest, "--run-dir", run_dir, "--resume"]


def test_an_array_task_is_a_seed_and_has_a_run_of_its_own(project):
    env = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "2"}
    env |= {"SUMMARY": summary(train_seconds=3.5), "RUN": "runs/cifar-dist-70_2", "SRUN_CODE": "75"}
    code, out, _ = run(project, "array.sh", "--recipe", "quick", **env)
    assert code == 0
    assert out.splitlines()[-1] == "requeued: interrupted, after 3.5 s of training"
    (words,) = calls(project, "srun")
    assert "launch.py --seed 2 --recipe quick --run-dir runs/cifar-dist-70_2 --resume" in " ".join(words)
    assert calls(project, "scontrol")[-1] == ["requeue", "70_2"], "the whole array would be requeued"


@pytest.mark.parametrize(
    ("status", "srun_code", "batch_flag", "code", "requeued"),
    [
        ("completed", 0, 1, 0, False),
        ("completed", 137, 1, 0, False),  # the first to leave made srun kill the others
        ("early_stopped", 0, 1, 0, False),
        ("completed", 2, 1, 2, False),  # what was asked for besides was refused
        ("diverged", 1, 1, 1, False),
        ("diverged", 137, 1, 1, False),
        ("interrupted", 75, 1, 0, True),
        ("interrupted", 137, 2, 0, True),
        ("running", 137, 1, 0, True),  # killed
        ("interrupted", 75, 0, 75, False),  # a salloc shell
        ("interrupted", 2, 1, 2, False),
        (None, 2, 1, 2, False),
        (None, 1, 1, 1, False),
        (None, 75, 1, 0, True),  # told to end before there was anything
    ],
)
def test_what_becomes_of_the_job(project, status, srun_code, batch_flag, code, requeued):
    left = "" if status is None else summary(status=status, test=None)
    env = {"SUMMARY": left, "RUN": RUN, "SRUN_CODE": str(srun_code), "BATCH_FLAG": str(batch_flag)}
    ended, _, err = run(project, "train.sh", **env)
    assert (ended, err) == (code, "")
    assert (calls(project, "scontrol")[-1] == ["requeue", "71"]) == requeued


@pytest.mark.parametrize(("srun_code", "code", "requeued"), [(137, 137, False), (75, 0, True), (0, 0, False)])
def test_the_outcome_of_an_earlier_start_is_not_this_ones(project, srun_code, code, requeued):
    """A run that was complete, is to go on for longer, and was ended before it had said that it goes on."""
    (project / RUN).mkdir(parents=True)
    (project / RUN / "summary.json").write_text(summary(status="completed"))
    ended, _, _ = run(project, "train.sh", SRUN_CODE=str(srun_code))
    assert ended == code
    assert (calls(project, "scontrol")[-1] == ["requeue", "71"]) == requeued


def test_restarts_without_progress_come_to_an_end(project):
    def once(seconds: float) -> tuple[int, str]:
        left = summary(status="running", train_seconds=seconds)
        code, _, err = run(project, "train.sh", SUMMARY=left, RUN=RUN, SRUN_CODE="1")
        return code, err

    assert [once(5.5) for _ in range(3)] == [(0, "")] * 3
    assert [once(7.25) for _ in range(3)] == [(0, "")] * 3, "it had trained further"
    assert once(7.25) == (1, "error: not requeued: restarted 3 times, and none of them trained any further\n")
    assert len([words for words in calls(project, "scontrol") if words[0] == "requeue"]) == 6


def test_a_job_that_is_told_to_end_waits_for_the_run_and_is_not_requeued(project):
    process = begin(project, "train.sh", SUMMARY=summary(), RUN=RUN, STAY="1")
    proc = Path("/proc", str(process.pid))

    def wait_for(condition: Callable[[], bool]) -> None:
        while not condition():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)

    def waits_again() -> bool:
        """Whether bash has handled SIGTERM: it is not pending any more, and bash sleeps."""
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        return not int(status["ShdPnd"], 16) & 1 << signal.SIGTERM - 1 and status["State"].strip()[0] == "S"

    wait_for((project / "started").exists)
    (srun,) = [int(pid) for pid in (proc / "task" / proc.name / "children").read_text().split()]
    process.send_signal(signal.SIGTERM)
    wait_for(waits_again)
    os.kill(srun, signal.SIGUSR1)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (75, "")
    assert ["requeue", "71"] not in calls(project, "scontrol")


def test_the_environment_is_activated(project):
    (project / "bin" / "python").write_text("")
    (project / "mine.sh").write_text("echo mine $undefined\n")
    assert run(project, "train.sh", CIFAR_DIST_ACTIVATE="mine.sh")[1].startswith("mine")
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "activate").write_text("echo venv\n")
    assert run(project, "train.sh")[1].startswith("venv")
    code, out, err = run(project, "train.sh", CIFAR_DIST_ACTIVATE="none.sh")
    assert (code, out) == (2, "")
    assert err == "error: there is no none.sh: CIFAR_DIST_ACTIVATE names the file that activates the environment\n"


@pytest.mark.parametrize("script", ["train.sh", "eval.sh", "array.sh"])
def test_elsewhere_it_is_one_line(project, script):
    code, out, err = run(project, script, SLURM_SUBMIT_DIR="/tmp")
    assert (code, out, err) == (2, "", "error: there is no launch.py in /tmp: submit from its folder\n")


def test_data_is_staged_once_a_node(project):
    env = {"CIFAR_DIST_STAGE": "/local/x"}
    assert run(project, "train.sh", "--data-dir", "big", **env, **TWO_NODES_OF_GPUS)[0] == 0
    copy, train = calls(project, "srun")
    assert copy[:4] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
    assert copy[-3:-1] == ["big", "/local/x"]
    assert " ".join(train).count("--data-dir big --data-dir /local/x --run-dir") == 1
    (project / "calls").unlink()
    code, _, err = run(project, "train.sh", STAGE_CODE="1", **env)
    assert (code, err) == (2, "error: cannot copy data/cifar-* to /local/x\n")
    assert len(calls(project, "srun")) == 1


def test_the_copy_that_is_staged(tmp_path):
    """The command itself, which the pretended srun does not run."""
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "data" / "cifar-10-batches-py" / "test_batch").write_text("x")
    command = next(line for line in (ROOT / "slurm" / "train.sh").read_text().splitlines() if "cp -ru" in line)
    inner = command.split("'")[1]
    for _ in range(2):
        subprocess.run(["bash", "-c", inner, tmp_path / "data", tmp_path / "node" / "local"], check=True)
    assert (tmp_path / "node" / "local" / "cifar-10-batches-py" / "test_batch").read_text() == "x"


def test_evaluation(project):
    code, _, err = run(project, "eval.sh", "--ckpt", "runs/x", **slurm("GPUS_ON_NODE=2 CPUS_ON_NODE=8"))
    assert (code, err) == (0, "")
    (words,) = calls(project, "srun")
    assert " ".join(words[:-1]) == (
        "--nodes=1 --ntasks=2 --ntasks-per-node=2 --cpus-per-task=4 --kill-on-bad-exit=1"
        " python launch.py eval --ckpt runs/x"
    )


@pytest.mark.parametrize(
    ("launcher", "command"),
    [
        (
            "torchrun",
            "torchrun --nnodes=2 --nproc-per-node=4 --rdzv-id=71 --rdzv-backend=c10d"
            f" --rdzv-endpoint=gpu07:{PORT} launch.py",
        ),
        (
            "accelerate",
            'bash -c exec accelerate launch --machine_rank "$SLURM_NODEID" "$@" bash --multi_gpu --num_machines 2'
            " --num_processes 8 --mixed_precision no --dynamo_backend no"
            f" --main_process_ip gpu07 --main_process_port {PORT} launch.py",
        ),
    ],
)  # fmt: skip
def test_an_agent_a_node(project, launcher, command):
    assert run(project, "train.sh", CIFAR_DIST_LAUNCHER=launcher, **TWO_NODES_OF_GPUS)[0] == 0
    (words,) = calls(project, "srun")
    assert " ".join(words[:-1]) == (
        "--nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=8 --kill-on-bad-exit=1"
        f" {command} --run-dir runs/cifar-dist-71 --resume"
    )


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"CIFAR_DIST_LAUNCHER": "mpirun"}, "CIFAR_DIST_LAUNCHER must be srun, torchrun or accelerate, not mpirun"),
        ({"CIFAR_DIST_LAUNCHER": "torchrun", "SLURM_NTASKS": "3"}, "torchrun starts equally many processes a node:"),
        ({"CIFAR_DIST_LAUNCHER": "accelerate", "NO_HOSTNAMES": "1"}, "accelerate needs scontrol to find the first"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(project, env, message):
    code, _, err = run(project, "train.sh", **env)
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck():
    scripts = [*(ROOT / "slurm").glob("*.sh"), *(ROOT / "benchmarks").glob("*.sh"), ROOT / "tests/slurm/cluster.sh"]
    checked = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", ["train.sh", "array.sh", "eval.sh"])
def test_a_job_asks_for_nothing_that_a_node_may_lack(script):
    lines = (ROOT / "slurm" / script).read_text().splitlines()
    asked = {line.split()[1].partition("=")[0] for line in lines if line.startswith("#SBATCH")}
    assert asked <= {"--job-name", "--output", "--open-mode", "--time", "--array", "--requeue", "--signal"}
