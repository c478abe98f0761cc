"""A Slurm job: the layout of its tasks, the command that starts them, and what becomes of the job afterwards.

Run by the scripts of this folder as `python slurm/job.py train|eval|tune ARGUMENTS`. It needs Python alone.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 75
"""As cifar_dist/config/errors.py has them."""
_MOST_RESTARTS = 3
"""Restarts in a row that did not train any further."""
_COPY = 'mkdir -p "$1" && cp -ru "$0"/cifar-*-* "$1"'


class JobError(Exception):
    """A job that cannot be started as it was asked for."""


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Run a script's command. Return the exit code of the job."""
    command, *arguments = argv
    try:
        host = (_scontrol("show", "hostnames", environ.get("SLURM_JOB_NODELIST", "")).splitlines() or [""])[0]
        child = child_environment(environ, host)
        if command == "tune":
            return _tune(arguments, child)
        step = step_command(environ, host)
        if command == "eval":
            os.execvpe(step[0], [*step, "eval", *arguments], child)
        return _train(step, arguments, child)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _scontrol(*words: str) -> str:
    try:
        return subprocess.run(["scontrol", *words], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def _port(environ: Mapping[str, str]) -> int:
    """Return a port: jobs on one node need different ones, and from 32768 on outgoing connections have them."""
    return 12_000 + int(environ.get("SLURM_JOB_ID", 0)) % 20_000


def child_environment(environ: Mapping[str, str], host: str) -> dict[str, str]:
    """Return the environment of srun, which would weigh the CPUs that were typed against what it is told."""
    child = {
        name: value for name, value in environ.items() if name not in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_PER_GPU")
    }
    if host:  # without scontrol, launch.py reads the node list itself
        child |= {"MASTER_ADDR": host, "MASTER_PORT": str(_port(environ))}
    # torchrun's agent forwards the signal that it gets, and waits 30 s; of USR2 it would die.
    return child | {"PYTHONUNBUFFERED": "1", "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"}


def step_command(environ: Mapping[str, str], host: str) -> list[str]:
    """Return the command that starts launch.py in all processes of the job. Raises JobError.

    There is a task for each GPU of a node, else one a node; a typed number of tasks wins. srun is told all of it, and
    the CPUs: for `--gpus-per-node=8` alone it would start one task with one CPU a node.
    """

    def number(name: str, default: int = 1) -> int:
        return int(environ.get(f"SLURM_{name}") or default)

    nodes, node_cpus = number("JOB_NUM_NODES"), number("CPUS_ON_NODE")
    per_node = number("NTASKS_PER_NODE", number("GPUS_ON_NODE"))
    cpus, gpus = node_cpus // per_node, environ.get("SLURM_GPUS")
    is_even = "SLURM_NTASKS_PER_NODE" in environ or not (number("NTASKS") > 1 or gpus)
    if is_even:
        layout = [f"--nodes={nodes}", f"--ntasks={nodes * per_node}", f"--ntasks-per-node={per_node}"]
    elif number("NTASKS") > 1:  # --ntasks=N: Slurm lays them out
        layout, cpus = [f"--ntasks={number('NTASKS')}"], number("CPUS_PER_TASK")
    else:  # --gpus=a100:4,h100:2: some nodes may have more than others
        count = sum(int(each.rpartition(":")[2]) for each in str(gpus).split(","))
        layout = [f"--ntasks={count}", "--gpus-per-task=1"]
    layout += [] if cpus else ["--overcommit"]
    launcher = environ.get("CIFAR_DIST_LAUNCHER", "srun")
    if launcher == "srun":  # each process is a task, and gets every signal itself
        return ["srun", *layout, f"--cpus-per-task={cpus or 1}", "--kill-on-bad-exit=1", "python", "launch.py"]
    if launcher not in ("torchrun", "accelerate"):
        raise JobError(f"CIFAR_DIST_LAUNCHER must be srun, torchrun or accelerate, not {launcher}")
    if not is_even:
        raise JobError(f"{launcher} starts equally many processes a node: type --ntasks-per-node")
    if not host:
        raise JobError(f"{launcher} needs scontrol to find the first node")
    step = [*_one_task_a_node(nodes, node_cpus), "--kill-on-bad-exit=1"]
    port = _port(environ)
    if launcher == "torchrun":
        step += ["torchrun", f"--nnodes={nodes}", f"--nproc-per-node={per_node}", "--rdzv-backend=c10d"]
        return [*step, f"--rdzv-id={environ.get('SLURM_JOB_ID')}", f"--rdzv-endpoint={host}:{port}", "launch.py"]
    # The task itself knows its node's number.
    step += ["bash", "-c", 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"', "bash", "--multi_gpu"]
    step += ["--num_machines", str(nodes), "--num_processes", str(nodes * per_node), "--mixed_precision", "no"]
    return [*step, "--dynamo_backend", "no", "--main_process_ip", host, "--main_process_port", str(port), "launch.py"]


def _one_task_a_node(nodes: int, cpus: int) -> list[str]:
    return ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={cpus}"]


def _tune(typed: list[str], environ: Mapping[str, str]) -> int:
    """Run a worker of a study as one task, which starts the processes of its trials. Raises JobError."""
    if int(environ.get("SLURM_JOB_NUM_NODES") or 1) > 1:
        raise JobError("a worker of a study has one node: leave out --nodes, and type --array for more workers")
    name = _job_name(environ)
    job = _scontrol("show", "job", "-o", name)
    step = [*_one_task_a_node(1, int(environ.get("SLURM_CPUS_ON_NODE") or 1)), "python", "launch.py", "tune", *typed]
    code, may_requeue = _run_step(step, environ, job)
    return _requeue(name) if code == EXIT_INTERRUPTED and may_requeue else code


def _train(step: list[str], typed: list[str], environ: Mapping[str, str]) -> int:
    name = _job_name(environ)
    run_dir, arguments = split_run_dir(typed)
    run_dir = run_dir or Path("runs", f"{environ.get('SLURM_JOB_NAME', 'cifar-dist')}-{name}")
    job = _scontrol("show", "job", "-o", name)
    log = re.search(r" StdOut=(\S*)", job)
    print(f"run directory {run_dir.resolve()}, log {log[1] if log else ''}", flush=True)
    if stage := environ.get("CIFAR_DIST_STAGE"):  # a folder on each node's own disk
        following = dict(pairwise(typed)) | dict(word.split("=", 1) for word in typed if "=" in word)
        data_dir = following.get("--data-dir", "data")
        copy = [*_one_task_a_node(int(environ.get("SLURM_JOB_NUM_NODES", 1)), 1), "bash", "-c", _COPY, data_dir, stage]
        if subprocess.run(copy, env=environ, check=False).returncode:
            raise JobError(f"cannot copy {data_dir}/cifar-* to {stage}")
        arguments += ["--data-dir", stage]
    before = _read(run_dir / "summary.json")
    command = [*step, *arguments, "--run-dir", str(run_dir), "--resume"]
    code, may_requeue = _run_step(command, environ, job)
    end = job_end(run_dir, code, before=before, may_requeue=may_requeue)
    return end if end is not None else _requeue(name)


def _job_name(environ: Mapping[str, str]) -> str:
    """Return the number of the job; of a task of an array its own: its job's would requeue all tasks."""
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID", "0")


def _run_step(command: list[str], environ: Mapping[str, str], job: str) -> tuple[int, bool]:
    """Run a step to its end. Return its exit code, and whether the job may be requeued; `job` is scontrol's line."""
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):  # of a job's end, Ctrl-C, warnings
        signal.signal(number, lambda number, _: signals.append(number))
    code = subprocess.Popen(command, env=environ).wait()
    # What was cancelled stays so, and Slurm requeues by itself what it preempts. A salloc shell is not requeued.
    may_requeue = signal.SIGTERM not in signals and re.search(r"BatchFlag=[1-9]", job) is not None
    return (128 - code if code < 0 else code), may_requeue


def _requeue(name: str) -> int:
    return subprocess.run(["scontrol", "requeue", name], check=False).returncode


def split_run_dir(typed: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the run directory of `--run-dir` or `--resume`, and the arguments without these flags."""
    run_dir, rest, words = None, list[str](), list(typed)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag not in ("--run-dir", "--resume"):
            rest.append(word)
        elif equals:
            run_dir = Path(value)
        elif words and not words[0].startswith("-"):
            run_dir = Path(words.pop(0))
    return run_dir, rest


def job_end(run_dir: Path, code: int, *, before: str | None, may_requeue: bool) -> int | None:
    """Return the exit code of a job whose srun ended with `code`; None if it must be requeued.

    The run's summary.json decides: srun's code may be that of a process that it killed itself. `before` is the
    summary's text before the start. Restarts without progress are counted in the run directory.
    """
    text = _read(run_dir / "summary.json")
    try:
        summary = json.loads(text or "{}")
        status, seconds = summary.get("status"), summary.get("train_seconds", 0)
    except (ValueError, AttributeError):
        status, seconds = None, 0
    if code != 0 and status not in ("interrupted", "running") and text == before:
        status = None  # that of an earlier start, which this one did not come to replace
    if code == EXIT_USER_ERROR or (status is None and code != EXIT_INTERRUPTED):
        return code
    if status in ("completed", "early_stopped", "diverged"):
        return EXIT_FAILED if status == "diverged" else 0
    if not may_requeue:
        return code
    # Interrupted, or killed with its node or by a lack of memory: again, but not for ever if nothing comes of it.
    counter = run_dir / "slurm-restarts"
    last, _, count = (_read(counter) or "").partition(" ")
    restarts = int(count or 0) if last == str(seconds) else 0
    if restarts >= _MOST_RESTARTS:
        print(f"error: not requeued: restarted {restarts} times, and none of them trained any further", file=sys.stderr)
        return EXIT_FAILED
    run_dir.mkdir(parents=True, exist_ok=True)
    counter.write_text(f"{seconds} {restarts + 1}")
    print(f"requeued: {status or 'not begun'}, after {seconds} s of training", flush=True)
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
