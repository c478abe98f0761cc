"""What the scripts of slurm/ ask of Slurm for jobs of every shape; a pretended srun and scontrol record it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm.job import JobError, job_end, split_run_dir, step_command
from tests.conftest import ROOT

# Writes its arguments down, leaves the summary that it is told to, and ends as it is told to.
SRUN = r"""#!/usr/bin/env bash
{ printf '%s\n' srun "$@"; echo "MASTER=${MASTER_ADDR-none}:${MASTER_PORT-none} CPUS=${SLURM_CPUS_PER_TASK-}"; } >>calls
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
RUN = "runs/cifar-dist-71"


@pytest.fixture
def project(tmp_path) -> Path:
    (tmp_path / "bin").mkdir()
    python = f'#!/bin/sh\nexec {sys.executable} -S "$@"\n'  # the module needs no other package
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", python)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "launch.py").write_text("")
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    return tmp_path


def begin(project: Path, script: str, *arguments: str, **env: str) -> subprocess.Popen:
    spool = project.parent / "slurm_script"  # Slurm runs a copy
    shutil.copy(ROOT / "slurm" / script, spool)
    environ = {"PATH": f"{project / 'bin'}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(project)} | JOB | env
    return subprocess.Popen(
        ["bash", spool, *arguments], cwd="/", env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(project: Path, script: str, *arguments: str, **env: str) -> tuple[int, str, str]:
    process = begin(project, script, *arguments, **env)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def summary(**values) -> str:
    return json.dumps({"status": "interrupted", "train_seconds": 1.25} | values)


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
    "CPUS_ON_NODE=8": f"--nodes=1 --ntasks=1 {ONE_A_NODE}",
    f"{TWO} CPUS_ON_NODE=8 CPUS_PER_TASK=8": f"--nodes=2 --ntasks=2 {ONE_A_NODE}",
    "JOB_NUM_NODES=4 GPUS_ON_NODE=8 GPUS_PER_NODE=8 CPUS_ON_NODE=64": (
        "--nodes=4 --ntasks=32 --ntasks-per-node=8 --cpus-per-task=8"
    ),
    "GPUS_ON_NODE=8 CPUS_ON_NODE=4": "--nodes=1 --ntasks=8 --ntasks-per-node=8 --overcommit --cpus-per-task=1",
    f"{TWO} NTASKS_PER_NODE=4 NTASKS=8 CPUS_ON_NODE=8": ("--nodes=2 --ntasks=8 --ntasks-per-node=4 --cpus-per-task=2"),
    f"{TWO} NTASKS=3 CPUS_PER_TASK=2 CPUS_ON_NODE=4": "--ntasks=3 --cpus-per-task=2",
    f"{TWO} GPUS=a100:4,h100:2 GPUS_ON_NODE=4 CPUS_ON_NODE=8": "--ntasks=6 --gpus-per-task=1 --cpus-per-task=2",
    "NTASKS=4 GPUS_PER_TASK=1 GPUS_ON_NODE=4 CPUS_PER_TASK=8": "--ntasks=4 --cpus-per-task=8",
}


def slurm(words: str) -> dict[str, str]:
    return dict(f"SLURM_{word}".split("=", 1) for word in words.split())


GPUS = JOB | slurm("JOB_NUM_NODES=2 GPUS_ON_NODE=4 CPUS_ON_NODE=8")


@pytest.mark.parametrize(("env", "layout"), SHAPES.items())
def test_the_tasks_of_a_job(env, layout):
    assert step_command(slurm(env), "gpu07") == [
        "srun", *layout.split(), "--kill-on-bad-exit=1", "python", "launch.py"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("launcher", "command"),
    [
        (
            "torchrun",
            "torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-id=71"
            f" --rdzv-endpoint=gpu07:{PORT} launch.py",
        ),
        (
            "accelerate",
            'bash -c exec accelerate launch --machine_rank "$SLURM_NODEID" "$@" bash --multi_gpu --num_machines 2'
            " --num_processes 8 --mixed_precision no --dynamo_backend no"
            f" --main_process_ip gpu07 --main_process_port {PORT} launch.py",
        ),
    ],
)
def test_an_agent_a_node(launcher, command):
    step = step_command(GPUS | {"CIFAR_DIST_LAUNCHER": launcher}, "gpu07")
    srun = "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=8 --kill-on-bad-exit=1"
    assert " ".join(step) == f"{srun} {command}"


@pytest.mark.parametrize(
    ("environ", "host", "message"),
    [
        ({"CIFAR_DIST_LAUNCHER": "mpirun"}, "a", "CIFAR_DIST_LAUNCHER must be srun, torchrun or accelerate"),
        (
            {"CIFAR_DIST_LAUNCHER": "torchrun", "SLURM_NTASKS": "3"},
            "a",
            "torchrun starts equally many processes a node",
        ),
        ({"CIFAR_DIST_LAUNCHER": "accelerate"}, "", "accelerate needs scontrol to find the first"),
    ],
)
def test_what_cannot_be_started_is_refused(environ, host, message):
    with pytest.raises(JobError, match=message):
        step_command(environ, host)


@pytest.mark.parametrize(
    ("typed", "run_dir", "rest"),
    [
        ("--run-dir mine", "mine", ""), ("--run-dir=mine --seed 1", "mine", "--seed 1"), ("--resume mine", "mine", ""),
        ("train --resume --seed 1", None, "train --seed 1"), ("--seed 1 --resume", None, "--seed 1"),
    ],
)  # fmt: skip
def test_a_run_directory_that_was_typed(typed, run_dir, rest):
    assert split_run_dir(typed.split()) == (run_dir and Path(run_dir), rest.split())


@pytest.mark.parametrize(
    ("status", "code", "may_requeue", "end"),
    [
        ("completed", 0, True, 0),
        ("completed", 137, True, 0),  # the first to leave made srun kill the others
        ("early_stopped", 0, True, 0),
        ("completed", 2, True, 2),  # what was asked for besides was refused
        ("diverged", 137, True, 1),
        ("interrupted", 75, True, None),
        ("interrupted", 137, True, None),
        ("running", 137, True, None),  # killed
        ("interrupted", 75, False, 75),  # a salloc shell, or cancelled
        ("interrupted", 2, True, 2),
        (None, 2, True, 2),
        (None, 1, True, 1),
        (None, 75, True, None),  # told to end before there was anything
    ],
)
def test_what_becomes_of_the_job(tmp_path, status, code, may_requeue, end):
    if status is not None:
        (tmp_path / "summary.json").write_text(summary(status=status))
    assert job_end(tmp_path, code, before=None, may_requeue=may_requeue) == end


@pytest.mark.parametrize(("code", "end"), [(137, 137), (75, None), (0, 0)])
def test_the_outcome_of_an_earlier_start_is_not_this_ones(tmp_path, code, end):
    """A run that was complete is to train for longer, and was ended before it had written anything."""
    (tmp_path / "summary.json").write_text(summary(status="completed"))
    assert job_end(tmp_path, code, before=summary(status="completed"), may_requeue=True) == end


def test_restarts_without_progress_come_to_an_end(tmp_path, capsys):
    def once(seconds: float) -> int | None:
        (tmp_path / "summary.json").write_text(summary(status="running", train_seconds=seconds))
        return job_end(tmp_path, 1, before=None, may_requeue=True)

    assert [once(5.5) for _ in range(3)] == [None] * 3
    assert [once(7.25) for _ in range(3)] == [None] * 3, "it had trained further"
    assert once(7.25) == 1
    assert capsys.readouterr().err == ("error: not requeued: restarted 3 times, and none of them trained any further\n")


def test_a_job_trains(project):
    code, out, err = run(project, "train.sh", "--recipe", "strong", "--set", "a=1", SLURM_CPUS_PER_TASK="8")
    assert (code, err) == (0, "")
    assert out == f"run directory {project}/{RUN}, log /logs/cifar-dist-71.out\n"
    (words,) = calls(project, "srun")
    launch = f"python launch.py --recipe strong --set a=1 --run-dir {RUN} --resume"
    assert " ".join(words).endswith(f"{launch} MASTER=gpu07:{PORT} CPUS=")
    assert calls(project, "scontrol") == [["show", "hostnames", "gpu[07-08]"], ["show", "job", "-o", "71"]]


def test_without_scontrol_the_processes_find_the_node_themselves(project):
    assert run(project, "train.sh", NO_HOSTNAMES="1")[0] == 0
    assert calls(project, "srun")[0][-1] == "MASTER=none:none CPUS="


def test_an_array_task_is_a_seed_and_has_a_run_of_its_own(project):
    env = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "2"}
    env |= {"SUMMARY": summary(train_seconds=3.5), "RUN": "runs/cifar-dist-70_2", "SRUN_CODE": "75"}
    code, out, err = run(project, "array.sh", "--recipe", "quick", **env)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "requeued: interrupted, after 3.5 s of training"
    (words,) = calls(project, "srun")
    assert "launch.py --seed 2 --recipe quick --run-dir runs/cifar-dist-70_2 --resume" in " ".join(words)
    assert calls(project, "scontrol")[-1] == ["requeue", "70_2"], "the whole array would be requeued"


def test_a_job_that_is_told_to_end_waits_for_the_run_and_is_not_requeued(project):
    process = begin(project, "train.sh", SUMMARY=summary(), RUN=RUN, STAY="1")
    proc = Path("/proc", str(process.pid))

    def wait_for(condition: Callable[[], bool]) -> None:
        while not condition():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)

    def waits_again() -> bool:
        """Whether SIGTERM has been handled: it is not pending any more, and the process sleeps."""
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
    (project / "mine.sh").write_text("echo mine $undefined\n")
    assert run(project, "train.sh", CIFAR_DIST_ACTIVATE="mine.sh")[1].startswith("mine")
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "activate").write_text("echo venv\n")
    assert run(project, "train.sh")[1].startswith("venv")
    code, out, err = run(project, "train.sh", CIFAR_DIST_ACTIVATE="none.sh")
    assert (code, out) == (2, "")
    assert err == "error: there is no none.sh: CIFAR_DIST_ACTIVATE names the file that activates the environment\n"


@pytest.mark.parametrize("script", ["train.sh", "eval.sh", "array.sh", "tune.sh"])
def test_elsewhere_it_is_one_line(project, script):
    code, out, err = run(project, script, SLURM_SUBMIT_DIR="/tmp")
    assert (code, out, err) == (2, "", "error: there is no launch.py in /tmp: submit from its folder\n")


def test_data_is_staged_once_a_node(project, tmp_path):
    env = {"CIFAR_DIST_STAGE": "/local/x"}
    assert run(project, "train.sh", "--data-dir", "big", **env, **GPUS)[0] == 0
    copy, train = calls(project, "srun")
    assert copy[:4] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
    assert copy[-3:-1] == ["big", "/local/x"]
    assert " ".join(train).count("--data-dir big --data-dir /local/x --run-dir") == 1
    code, _, err = run(project, "train.sh", "--data-dir=more", STAGE_CODE="1", **env)
    assert (code, err) == (2, "error: cannot copy more/cifar-* to /local/x\n")
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "data" / "cifar-10-batches-py" / "test_batch").write_text("x")
    for _ in range(2):  # the command itself, which the pretended srun does not run
        subprocess.run(["bash", "-c", copy[-4], tmp_path / "data", tmp_path / "node" / "local"], check=True)
    assert (tmp_path / "node" / "local" / "cifar-10-batches-py" / "test_batch").read_text() == "x"


def test_evaluation(project):
    code, _, err = run(project, "eval.sh", "--ckpt", "runs/x", **slurm("GPUS_ON_NODE=2 CPUS_ON_NODE=8"))
    assert (code, err) == (0, "")
    (words,) = calls(project, "srun")
    layout = "--nodes=1 --ntasks=2 --ntasks-per-node=2 --cpus-per-task=4 --kill-on-bad-exit=1"
    assert " ".join(words[:-1]) == f"{layout} python launch.py eval --ckpt runs/x"


@pytest.mark.parametrize(
    ("srun_code", "batch", "code", "requeued"),
    [(0, 1, 0, False), (75, 1, 0, True), (75, 0, 75, False), (2, 1, 2, False)],
)
def test_a_worker_of_a_study_is_one_task_and_goes_on_after_a_warning(project, srun_code, batch, code, requeued):
    env = {
        "SLURM_ARRAY_JOB_ID": "70",
        "SLURM_ARRAY_TASK_ID": "2",
        "SRUN_CODE": str(srun_code),
        "BATCH_FLAG": str(batch),
    }
    env |= slurm("GPUS_ON_NODE=4 CPUS_ON_NODE=8")
    assert run(project, "tune.sh", "--study", "s", "--trials", "9", **env) == (code, "", "")
    (words,) = calls(project, "srun")
    layout = "--nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=8"
    assert " ".join(words[:-1]) == f"{layout} python launch.py tune --study s --trials 9"
    assert (calls(project, "scontrol")[-1] == ["requeue", "70_2"]) == requeued


def test_a_worker_of_a_study_has_one_node(project):
    message = "error: a worker of a study has one node: leave out --nodes, and type --array for more workers\n"
    assert run(project, "tune.sh", "--study", "s", **slurm(TWO)) == (2, "", message)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck():
    scripts = [*(ROOT / "slurm").glob("*.sh"), *(ROOT / "benchmarks").glob("*.sh"), ROOT / "tests/slurm/cluster.sh"]
    checked = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", ["train.sh", "array.sh", "eval.sh", "tune.sh"])
def test_a_job_asks_for_nothing_that_a_node_may_lack(script):
    lines = (ROOT / "slurm" / script).read_text().splitlines()
    asked = {line.split()[1].partition("=")[0] for line in lines if line.startswith("#SBATCH")}
    assert asked <= {"--job-name", "--output", "--open-mode", "--time", "--array", "--requeue", "--signal"}
