"""The scripts of slurm/ on a real cluster of two nodes: trained, warned, preempted, killed, cancelled, requeued."""

import json
import re
import shlex
import sys
from pathlib import Path

import psutil
import pytest

from cifar_dist.cli import main
from cifar_dist.config.cpus import usable_cores
from cifar_dist.run.study import Study, read_definition
from tests.commands.test_train import assert_same_run
from tests.conftest import ROOT, make_images
from tests.slurm.conftest import Cluster, read_log
from tests.worlds.harness import run_ranks

QUICK = (
    "--recipe", "original", "--dataset", "images", "--precision", "no",
    "--set", "global_batch_size=8", "stem=small", "image_size=16", "early_stopping.enabled=false",
    "ema_decay=0.9", "optimizer.nesterov=true", "optimizer.learning_rate=0.001",
)  # fmt: skip
# So small a rate that the last bits of a sum, which differ with four shares, do not grow.
CALM = (*QUICK, "optimizer.learning_rate=0.00001", "global_batch_size=16", "--epochs", "3")
TRAIN, EVAL, ARRAY, TUNE = "slurm/train.sh", "slurm/eval.sh", "slurm/array.sh", "slurm/tune.sh"
FOREVER = ("--epochs", "100000")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder as a user has it: the project, an environment to be activated, and images."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("launch.py", "cifar_dist", "slurm", "accelerate_configs"):
        (folder / name).symlink_to(ROOT / name)
    path = f'export PATH="{Path(sys.executable).parent}:$PATH"'
    (folder / "env.sh").write_text(f"{path} OMP_NUM_THREADS=1\n")
    (folder / "all_cores.sh").write_text(f"{path}; unset OMP_NUM_THREADS\n")
    make_images(folder / "images")
    return folder


@pytest.fixture(scope="module")
def submit(cluster, project):
    """Submit a script of the project with arguments for sbatch, `--`, and arguments for the script."""

    def submit(*arguments: str, script: str = TRAIN, **env: str) -> str:
        split = arguments.index("--") if "--" in arguments else 0
        environ = {"CIFAR_DIST_ACTIVATE": "env.sh"} | env
        return cluster.submit(
            *arguments[:split], script, *arguments[split + ("--" in arguments) :], cwd=project, **environ
        )

    return submit


@pytest.fixture(scope="module")
def trained(cluster, submit, project) -> tuple[str, str]:
    """The numbers of a job of two nodes with two tasks each, and of an array; `runs/local` is one process's run."""
    four = submit(
        "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=2", "--", *CALM, CIFAR_DIST_ACTIVATE="all_cores.sh"
    )
    array = submit("--", *CALM, script=ARRAY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        assert main([*CALM, "--run-dir", "runs/local"]) == 0
    cluster.wait(four, "COMPLETED", timeout=180)
    cluster.wait(array, "COMPLETED", timeout=180)
    return four, array


def run_of(project: Path, job_id: str) -> Path:
    return project / "runs" / f"cifar-dist-{job_id}"


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def log_of(cluster: Cluster, job_id: str) -> str:
    return read_log(cluster.job(job_id))


def losses(run: Path) -> list[float]:
    return [json.loads(line)["train_loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for_training(cluster: Cluster, job_id: str, starts: int = 1) -> None:
    """Wait until a job has been started so often, and has since trained for two epochs."""

    def trains(job: dict[str, str]) -> bool:
        parts = read_log(job).split("run directory ")
        return len(parts) > starts and len(re.findall(r"^epoch +\d", parts[starts], re.MULTILINE)) >= 2

    cluster.wait_until(job_id, f"training after start {starts}", trains, timeout=300)


def test_two_nodes_of_two_tasks_train_as_one_process(cluster, trained, project):
    four, _ = trained
    assert losses(run_of(project, four)) == pytest.approx(losses(project / "runs/local"), rel=1e-4)
    summary = summary_of(run_of(project, four))
    assert (summary["world_size"], summary["num_threads"]) == (4, min(2, usable_cores()))
    log = log_of(cluster, four)
    assert log.splitlines()[0] == f"run directory {run_of(project, four)}, log {project}/cifar-dist-{four}.out"
    assert "16 = 4 per device x 4 processes x 1 accumulation" in log
    assert log.count("epoch 3/3") == 1, "other ranks print too"
    assert not {character for character in log if not character.isprintable()} - {"\n"}


def test_an_array_of_seeds_and_its_report(trained, project, monkeypatch, capsys):
    runs = [f"runs/cifar-dist-{trained[1]}_{seed}" for seed in range(3)]
    monkeypatch.chdir(project)
    assert losses(project / "runs/local") == losses(project / runs[0])
    assert main(["report", *runs]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[:4] for line in shown.splitlines()[1:4]] == [
        [Path(run).name, "completed", str(seed), "3/3"] for seed, run in enumerate(runs)
    ]
    assert "mean ± sd of 3 runs " in shown


def test_a_completed_run_is_left_alone_and_evaluated_by_three_tasks(cluster, submit, trained, project):
    """Three on two nodes, as Slurm lays them out."""
    run = f"runs/cifar-dist-{trained[0]}"
    again = submit("--", *CALM, "--run-dir", run)
    evaluated = submit("--nodes=2", "--ntasks=3", "--", "--ckpt", run, "--json", "result.json", script=EVAL)
    cluster.wait(again, "COMPLETED", timeout=120)
    assert "is completed (3 epochs" in log_of(cluster, again)
    cluster.wait(evaluated, "COMPLETED", timeout=120)
    result = json.loads((project / "result.json").read_text())
    assert (result["world_size"], result["top1"]) == (3, summary_of(project / run)["test"]["top1"])


def test_a_job_that_is_warned_preempted_and_cancelled_loses_nothing(cluster, submit, project):
    """It is requeued after the first two and not after the third, and the run ends with the same bits."""
    job_id = submit("--nodes=2", "--", *QUICK, *FOREVER)
    wait_for_training(cluster, job_id)
    assert cluster.run("scancel", "--signal=USR2", job_id).returncode == 0
    wait_for_training(cluster, job_id, starts=2)
    (job,) = cluster.jobs(job_id)
    log = read_log(job)
    assert (job["Restarts"], log.count("interrupted in epoch"), log.count("resumed in epoch")) == ("1", 1, 1)
    assert "requeued: interrupted, after" in log

    whole_nodes = ("--partition=high", "--nodes=2", "--cpus-per-task=64", "--output=/dev/null")
    high = cluster.submit(*whole_nodes, "--wrap", "true", cwd=project)
    cluster.wait(high, "COMPLETED", timeout=120)
    wait_for_training(cluster, job_id, starts=3)
    assert cluster.job(job_id)["Restarts"] == "2"

    assert cluster.run("scancel", job_id).returncode == 0
    cluster.wait_until(
        job_id, "end", lambda job: job["JobState"] == "CANCELLED" and read_log(job).count("and saved") == 3
    )
    assert cluster.job(job_id)["Restarts"] == "2"
    run = run_of(project, job_id)
    assert summary_of(run)["status"] == "interrupted"

    epochs = str(len(losses(run)) + 1)
    for arguments in (["--resume", str(run), "--epochs", epochs], [*QUICK, "--epochs", epochs, "--run-dir", "whole"]):
        ended = run_ranks(2, arguments, project, CIFAR_DIST_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
        assert [code for code, _, _ in ended] == [0, 0], ended
    assert_same_run(str(project / "whole"), str(run), epochs=int(epochs))


def test_a_killed_rank_and_a_killed_node_end_the_step_and_the_job_goes_on(cluster, submit, project):
    job_id = submit("--nodes=2", "--", *QUICK, *FOREVER, "--checkpoint-every-steps", "4")
    wait_for_training(cluster, job_id)
    ranks = [
        process
        for process in psutil.process_iter(["cmdline"])
        if f"runs/cifar-dist-{job_id}" in (process.info["cmdline"] or ()) and "python" in process.name()
    ]
    (rank,) = [process for process in ranks if process.environ()["SLURM_PROCID"] == "1"]
    rank.kill()
    cluster.wait_for_log(job_id, "requeued: running, after", timeout=20)
    wait_for_training(cluster, job_id, starts=2)
    cluster.crash("n2")
    # srun waits for the dead node until Slurm has noticed; here it notices when the node boots.
    cluster.wait_until(job_id, "end", lambda job: read_log(job).count("rank 0 ends: another") == 2, timeout=20)
    cluster.restore("n2")
    (job,) = cluster.wait_until(
        job_id, "a second going on", lambda job: read_log(job).count("resumed in epoch") == 2, timeout=300
    )
    assert job["Restarts"] == "2"


def test_a_study_goes_on_when_one_of_its_workers_is_preempted(cluster, submit, project):
    """Six trials, none lost or done twice. Each worker has a node of its own."""
    search = ("--study", "study", "--trials", "6", "--epochs", "40", "--pruner", "none")
    job_id = submit("--array=0-1", "--cpus-per-task=64", "--", *QUICK, "validation_size=8", *search, script=TUNE)
    cluster.wait_for_log(job_id, "trial ", timeout=60)
    high = cluster.submit(
        "--partition=high", "--cpus-per-task=64", "--output=/dev/null", "--wrap", "true", cwd=project
    )  # fmt: skip
    cluster.wait(high, "COMPLETED", timeout=120)
    jobs = cluster.wait(job_id, "COMPLETED", timeout=300)
    assert sorted(job["Restarts"] for job in jobs) == ["0", "1"]
    assert sum(read_log(job).count("interrupted; resume with:") for job in jobs) == 1
    assert sum(read_log(job).count(" goes on: ") for job in jobs) == 1
    trials = Study(project / "study", read_definition(project / "study")).all_trials()
    assert [each.state.name for each in trials] == ["COMPLETE"] * 6
    for number in range(6):
        assert len(losses(project / f"study/trials/{number:04}")) == 40


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
    wait_for_training(cluster, job_id)
    assert "x 2 processes x" in log_of(cluster, job_id)
    assert cluster.run("scancel", "--signal=USR2", job_id).returncode == 0
    cluster.wait_for_log(job_id, "requeued: interrupted, after", timeout=60)
    assert summary_of(run_of(project, job_id))["status"] == "interrupted"


def commands() -> list[str]:
    """What README and docs/slurm.md have a reader submit; there are two nodes here."""
    text = "\n".join((ROOT / name).read_text() for name in ("README.md", "docs/slurm.md"))
    found = re.findall(r"^sbatch (.*?)(?: +#.*)?$", text, re.MULTILINE)
    return sorted({command.replace("--nodes=4", "--nodes=2") for command in found})


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_docs_is_accepted(cluster, project, command):
    tested = cluster.run("sbatch", "--test-only", *shlex.split(command), cwd=project)
    assert tested.returncode == 0, tested.stderr
