"""The cluster of these tests does what the others take for granted."""

import os
from pathlib import Path

import pytest

SLOW = pytest.mark.skipif(
    os.environ.get("CIFAR_DIST_TEST_SLURM_SLOW") != "1", reason="takes a minute: set CIFAR_DIST_TEST_SLURM_SLOW=1"
)
# All that there is: two such jobs never run at once.
EVERYTHING = ("--nodes=2", "--ntasks-per-node=4", "--exclusive")
STAYS = "echo stays; sleep 600"


def first_run(task: str) -> tuple[str, ...]:
    """A batch job whose first run starts this shell command in every task; the second has nothing to do."""
    script = f"echo run ${{SLURM_RESTART_COUNT:-0}}; [ -n \"$SLURM_RESTART_COUNT\" ] || srun sh -c '{task}'"
    return "--open-mode=append", "--wrap", script


def lines(folder: Path, *, start: str = "") -> list[str]:
    """What the only batch job of a folder printed."""
    (log,) = folder.glob("slurm-*.out")
    return [line for line in log.read_text().splitlines() if line.startswith(start)]


def test_two_nodes(cluster, tmp_path):
    resolves = "$(getent ahostsv4 $0 | grep -c STREAM)"
    task = f"echo $SLURM_PROCID $SLURM_NTASKS $SLURM_LOCALID $SLURMD_NODENAME $(hostname) {resolves}"
    ran = cluster.run("srun", "--nodes=2", "--ntasks-per-node=2", "sh", "-c", task, cluster.nodes[0], cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    hosts = cluster.nodes if cluster.own_hostnames else [os.uname().nodename] * 2
    expected = [f"{rank} 4 {rank % 2} {cluster.nodes[rank // 2]} {hosts[rank // 2]} 1" for rank in range(4)]
    assert sorted(ran.stdout.splitlines()) == expected


def test_pretended_gpus(cluster, tmp_path):
    command = ("sh", "-c", "echo $CUDA_VISIBLE_DEVICES")
    ran = cluster.run("srun", "--nodes=2", "--gpus-per-node=2", *command, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (0, "0,1\n" * 2)


def test_an_array(cluster, tmp_path):
    job_id = cluster.submit("--array=0-2", "--wrap", "echo task $SLURM_ARRAY_TASK_ID", cwd=tmp_path)
    jobs = cluster.wait(job_id, "COMPLETED")
    assert sorted(Path(job["StdOut"]).read_text() for job in jobs) == ["task 0\n", "task 1\n", "task 2\n"]
    assert cluster.job(f"{job_id}_1")["ArrayTaskId"] == "1"


def test_a_requeued_job(cluster, tmp_path):
    job_id = cluster.submit(*first_run(STAYS), cwd=tmp_path)
    cluster.wait_for_log(job_id, "stays")
    assert cluster.run("scontrol", "requeue", job_id).returncode == 0
    (job,) = cluster.wait(job_id, "COMPLETED")
    assert job["Restarts"] == "1"
    assert lines(tmp_path, start="run") == ["run 0", "run 1"]


def test_a_signal_reaches_the_tasks_of_a_step(cluster, tmp_path):
    task = 'trap "echo signalled; exit 0" USR2; echo waits; while :; do sleep 0.1; done'
    job_id = cluster.submit("--wrap", f"srun sh -c '{task}'", cwd=tmp_path)
    cluster.wait_for_log(job_id, "waits")
    assert cluster.run("scancel", "--signal=USR2", job_id).returncode == 0
    cluster.wait(job_id, "COMPLETED")
    assert "signalled" in lines(tmp_path)


@pytest.mark.parametrize("reaction", ["asks to be requeued", pytest.param("stays until it is killed", marks=SLOW)])
def test_preemption_requeues(reaction, cluster, tmp_path):
    """A job that ends by itself within the grace time is not requeued, unless it asks for that."""
    if reaction == "asks to be requeued":
        *options, script = first_run('trap "exit 75" TERM; echo stays; while :; do sleep 0.1; done')
        script += " || scontrol requeue $SLURM_JOB_ID"
    else:
        *options, script = first_run(f'trap "" TERM; {STAYS}')
    low = cluster.submit(*EVERYTHING, *options, script, cwd=tmp_path)
    cluster.wait_for_log(low, "stays\n" * 8)
    high = cluster.submit(*EVERYTHING, "--partition=high", "--output=/dev/null", "--wrap", "true", cwd=tmp_path)
    cluster.wait(high, "COMPLETED", timeout=120)  # Slurm looks only twice a minute whose grace time is over
    (job,) = cluster.wait(low, "COMPLETED")
    assert job["Restarts"] == "1"
    assert lines(tmp_path, start="run") == ["run 0", "run 1"]


@pytest.mark.parametrize("noticed", ["when it boots", pytest.param("when it is silent", marks=SLOW)])
def test_a_crashed_node(noticed, cluster, tmp_path):
    job_id = cluster.submit(*EVERYTHING, *first_run(STAYS), cwd=tmp_path)
    cluster.wait_for_log(job_id, "stays\n" * 8)
    cluster.crash("n2")
    if noticed == "when it is silent":
        cluster.wait_until(job_id, "requeue", lambda job: job["Restarts"] == "1", timeout=120)
    cluster.restore("n2")
    (job,) = cluster.wait(job_id, "COMPLETED")
    assert job["Restarts"] == "1"
    assert lines(tmp_path, start="run") == ["run 0", "run 1"]
