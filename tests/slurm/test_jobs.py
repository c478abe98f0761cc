"""The scripts of slurm/ on a real cluster of two nodes: trained, warned, preempted, killed, cancelled, requeued."""

import json
import re
import shlex
import sys
from pathlib import Path

import psutil
import pytest

from cifar_dist.cli import main
from cifar_dist.runtime.threads import usable_cores
from tests.commands.test_train import assert_same_run
from tests.conftest import ROOT, make_images
from tests.slurm.conftest import Cluster, read_log

QUICK = (
    "--recipe", "original", "--dataset", "images", "--precision", "no",
    "--set", "global_batch_size=8", "stem=small", "image_size=16", "early_stopping.enabled=false",
    "ema_decay=0.9", "optimizer.nesterov=true",
)  # fmt: skip
TRAIN, EVAL, ARRAY = "slurm/train.sh", "slurm/eval.sh", "slurm/array.sh"
FOREVER = ("--epochs", "100000")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder as a user has it: the project, an environment to be activated, and images."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("launch.py", "cifar_dist", "slurm", "accelerate_configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "env.sh").write_text(f'export PATH="{Path(sys.executable).parent}:$PATH" OMP_NUM_THREADS=1\n')
    make_images(folder / "images")
    return folder


@pytest.fixture
def submit(cluster, project):
    """Submits a script of the project with arguments for sbatch, `--`, and arguments for the script."""

    def submit(*arguments: str, script: str = TRAIN, **env: str) -> str:
        split = arguments.index("--") if "--" in arguments else 0
        environ = {"CIFAR_DIST_ACTIVATE": "env.sh"} | env
        return cluster.submit(
            *arguments[:split], script, *arguments[split + ("--" in arguments) :], cwd=project, **environ
        )

    return submit


def run_of(project: Path, job_id: str) -> Path:
    return project / "runs" / f"cifar-dist-{job_id}"


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def log_of(cluster: Cluster, job_id: str) -> str:
    return read_log(cluster.job(job_id))


def losses(run: Path) -> list[float]:
    return [json.loads(line)["train_loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_one_task_and_two_nodes_of_two_tasks_give_what_one_process_gives(cluster, submit, project, monkeypatch):
    # So small a rate that the last bits of a sum, which differ with four shares, do not grow.
    calm = (*QUICK, "optimizer.learning_rate=0.00001", "global_batch_size=16", "--epochs", "3")
    one = submit("--", *calm)
    four = submit("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=2", "--", *calm)
    monkeypatch.chdir(project)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main([*calm, "--run-dir", "runs/local"]) == 0
    cluster.wait(one, "COMPLETED", timeout=120)
    cluster.wait(four, "COMPLETED", timeout=180)
    assert_same_run("runs/local", str(run_of(project, one)))
    assert losses(run_of(project, four)) == pytest.approx(losses(project / "runs/local"), rel=1e-4)
    summary = summary_of(run_of(project, four))
    assert (summary["world_size"], summary["num_threads"]) == (4, 1)

    log = log_of(cluster, four)
    assert log.splitlines()[0] == f"run directory {run_of(project, four)}, log {project}/cifar-dist-{four}.out"
    assert "16 = 4 per device x 4 processes x 1 accumulation" in log
    assert log.count("epoch 3/3") == 1, "other ranks talk too"
    assert not {character for character in log if not character.isprintable()} - {"\n"}

    # Done once: the same job again finds nothing to do.
    again = submit("--nodes=2", "--", *calm, "--run-dir", f"runs/cifar-dist-{four}")
    cluster.wait(again, "COMPLETED", timeout=120)
    assert "is completed (3 epochs" in log_of(cluster, again)
    evaluated = submit("--nodes=2", "--", "--ckpt", f"runs/cifar-dist-{four}", "--json", "result.json", script=EVAL)
    cluster.wait(evaluated, "COMPLETED", timeout=120)
    result = json.loads((project / "result.json").read_text())
    assert (result["world_size"], result["top1"]) == (2, summary["test"]["top1"])


def test_a_warned_job_saves_is_requeued_and_ends_with_the_same_bits(cluster, submit, project):
    """And one whose time is over without a warning (but a SIGCONT) is saved and not requeued."""
    arguments = ("--nodes=2", "--", *QUICK, "--epochs", "16")
    late = submit("--time=1", "--signal=CONT@1", "--", *QUICK, *FOREVER)
    whole = submit(*arguments)
    parts = submit(*arguments)
    cluster.wait_for_log(parts, "epoch  3/16", timeout=120)
    assert cluster.run("scancel", "--signal=USR2", parts).returncode == 0
    cluster.wait(whole, "COMPLETED", timeout=240)
    (job,) = cluster.wait(parts, "COMPLETED", timeout=240)
    log = log_of(cluster, parts)
    assert job["Restarts"] == "1"
    assert log.count("interrupted in epoch") == 1
    assert "requeued: interrupted, after" in log
    assert log.count("going on after step") == 1
    assert_same_run(str(run_of(project, whole)), str(run_of(project, parts)), epochs=16)

    (job,) = cluster.wait(late, "TIMEOUT", timeout=150)
    assert job["Restarts"] == "0"
    assert summary_of(run_of(project, late))["status"] == "interrupted"


def test_a_cancelled_job_is_saved_and_stays_cancelled(cluster, submit, project):
    job_id = submit("--nodes=2", "--", *QUICK, *FOREVER)
    cluster.wait_for_log(job_id, "epoch      2/100000", timeout=120)
    assert cluster.run("scancel", job_id).returncode == 0
    (job,) = cluster.wait(job_id, "CANCELLED", timeout=60)
    cluster.wait_until(job_id, "end", lambda job: job["JobState"] == "CANCELLED" and "saved" in read_log(job))
    assert job["Restarts"] == "0"
    assert summary_of(run_of(project, job_id))["status"] == "interrupted"
    assert "requeued" not in log_of(cluster, job_id)


def test_a_preempted_job_is_requeued(cluster, submit, project):
    whole = ("--nodes=2", "--cpus-per-task=64")
    low = submit(*whole, "--", *QUICK, *FOREVER)
    cluster.wait_for_log(low, "epoch      2/100000", timeout=120)
    high = cluster.submit(*whole, "--partition=high", "--output=/dev/null", "--wrap", "true", cwd=project)
    cluster.wait(high, "COMPLETED", timeout=120)
    (job,) = cluster.wait_for_log(low, "going on after step", timeout=120)
    assert job["Restarts"] == "1"


def test_a_killed_rank_and_a_killed_node_end_the_step_and_the_job_goes_on(cluster, submit, project):
    job_id = submit("--nodes=2", "--", *QUICK, *FOREVER, "--checkpoint-every-steps", "1")
    cluster.wait_for_log(job_id, "epoch      2/100000", timeout=120)
    ranks = [
        process
        for process in psutil.process_iter(["cmdline"])
        if f"runs/cifar-dist-{job_id}" in (process.info["cmdline"] or ()) and "python" in process.name()
    ]
    (rank,) = [process for process in ranks if process.environ()["SLURM_PROCID"] == "1"]
    rank.kill()
    cluster.wait_for_log(job_id, "requeued: running, after", timeout=20)
    cluster.wait_for_log(job_id, "going on after step", timeout=120)
    done = log_of(cluster, job_id).count("epoch ")
    cluster.wait_until(job_id, "an epoch more", lambda job: read_log(job).count("epoch ") > done, timeout=120)
    cluster.crash("n2")
    # srun waits for the dead node until Slurm has noticed; here it notices when the node boots.
    cluster.wait_until(job_id, "end", lambda job: read_log(job).count("rank 0 ends: another") == 2, timeout=20)
    cluster.restore("n2")
    (job,) = cluster.wait_until(
        job_id, "a second going on", lambda job: read_log(job).count("going on after step") == 2, timeout=300
    )
    assert job["Restarts"] == "2"


def test_bad_input_is_not_requeued(cluster, submit, project):
    job_id = submit("--nodes=2", "--", *QUICK, "--set", "optimizer.learning_rat=1")
    (job,) = cluster.wait(job_id, "FAILED", timeout=60)
    assert (job["Restarts"], job["ExitCode"]) == ("0", "2:0")
    (line,) = [line for line in log_of(cluster, job_id).splitlines() if "srun" not in line][1:]
    assert line == "error: unknown recipe field 'optimizer.learning_rat', did you mean 'learning_rate'?"
    elsewhere = project / "elsewhere"
    elsewhere.mkdir()
    job_id = cluster.submit(ROOT / TRAIN, cwd=elsewhere)
    cluster.wait(job_id, "FAILED", timeout=60)
    assert log_of(cluster, job_id) == f"error: there is no launch.py in {elsewhere}: submit from its folder\n"


def test_an_array_of_seeds_and_its_report(cluster, submit, project, monkeypatch, capsys):
    job_id = submit("--", *QUICK, "--epochs", "1", script=ARRAY)
    cluster.wait(job_id, "COMPLETED", timeout=180)
    runs = [f"runs/cifar-dist-{job_id}_{seed}" for seed in range(3)]
    monkeypatch.chdir(project)
    assert main(["report", *runs]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[:4] for line in shown.splitlines()[1:4]] == [
        [Path(run).name, "completed", str(seed), "1/1"] for seed, run in enumerate(runs)
    ]
    assert "mean ± sd of 3 runs " in shown


def test_uneven_tasks(cluster, submit, project):
    """Three on two nodes, as Slurm lays them out, each with a thread for each of its cores, if there are so many."""
    (project / "plain.sh").write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"; unset OMP_NUM_THREADS\n')
    job_id = submit(
        "--nodes=2", "--ntasks=3", "--cpus-per-task=2",
        "--", *QUICK, "--set", "global_batch_size=6", "--epochs", "1", CIFAR_DIST_ACTIVATE="plain.sh",
    )  # fmt: skip
    cluster.wait(job_id, "COMPLETED", timeout=120)
    summary = summary_of(run_of(project, job_id))
    assert (summary["world_size"], summary["num_threads"]) == (3, min(2, usable_cores()))


def test_a_shell_in_an_allocation_is_not_requeued_and_does_not_hang(cluster, project):
    alone = cluster.run(
        "salloc", "--nodes=2", "--ntasks=2", sys.executable, "launch.py", *QUICK, "--epochs", "1", "--run-dir", "shell",
        cwd=project, OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    assert summary_of(project / "shell")["world_size"] == 1
    ended = cluster.run(
        "salloc", "--nodes=2", "bash", TRAIN, *QUICK, *FOREVER, "--max-minutes", "0.001",
        cwd=project, CIFAR_DIST_ACTIVATE="env.sh",
    )  # fmt: skip
    assert ended.returncode == 75, ended.stdout + ended.stderr
    assert "and saved" in ended.stderr
    assert "requeued" not in ended.stdout


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_an_agent_a_node(cluster, submit, project, launcher):
    job_id = submit("--nodes=2", "--", *QUICK, *FOREVER, CIFAR_DIST_LAUNCHER=launcher)
    cluster.wait_for_log(job_id, "epoch      2/100000", timeout=150)
    assert "x 2 processes x" in log_of(cluster, job_id)
    assert cluster.run("scancel", "--signal=USR2", job_id).returncode == 0
    cluster.wait_for_log(job_id, "requeued: interrupted, after", timeout=60)
    assert summary_of(run_of(project, job_id))["status"] == "interrupted"


@pytest.mark.parametrize("script", [TRAIN, EVAL, ARRAY])
def test_the_scripts_are_accepted(cluster, project, script):
    for more in ((), ("--nodes=2", "--gpus-per-node=2"), ("--gpus=3",), ("--ntasks=4", "--gpus-per-task=1")):
        tested = cluster.run("sbatch", "--test-only", *more, script, cwd=project)
        assert tested.returncode == 0, tested.stderr


def commands() -> list[str]:
    """What README and docs/slurm.md have a reader submit; there are two nodes here."""
    text = "\n".join((ROOT / name).read_text() for name in ("README.md", "docs/slurm.md"))
    found = re.findall(r"^sbatch (.*?)(?: +#.*)?$", text, re.MULTILINE)
    return sorted({command.replace("--nodes=4", "--nodes=2") for command in found})


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_docs_is_accepted(cluster, project, command):
    tested = cluster.run("sbatch", "--test-only", *shlex.split(command), cwd=project)
    assert tested.returncode == 0, tested.stderr
