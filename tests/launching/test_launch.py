"""Every way of starting several processes ends in the right world; checked by real processes, on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore

from tests.conftest import ROOT, make_images

pytestmark = pytest.mark.full

BIN = Path(sys.executable).parent
LAUNCH, MULTI_CPU = str(ROOT / "launch.py"), str(ROOT / "accelerate_configs" / "multi_cpu.yaml")
QUICK = (
    "--recipe", "original",
    "--set", "global_batch_size=8", "stem=small", "image_size=16", "early_stopping.enabled=false",
    "--dataset",
)  # fmt: skip
ONCE = ("--epochs", "1")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


def environment(**extra: str) -> dict[str, str]:
    """What a shell would give, without what pytest's own surroundings might have put there."""
    names = ("ACCELERATE_", "OMP_", "SLURM_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_", "TORCHELASTIC_", "CIFAR_DIST_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    return clean | {"PYTHONWARNINGS": "error::UserWarning:cifar_dist", "CUDA_VISIBLE_DEVICES": ""} | extra


def finish(*processes: subprocess.Popen, timeout: float = 150) -> list[tuple[int, str, str]]:
    """Wait for processes; give for each its exit code and what it printed."""
    ended = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            ended.append((process.returncode, out, err))
    finally:
        for process in processes:
            if process.poll() is None:
                for one in [*family(process), process]:
                    one.kill()
    return ended


def finish_agents(*agents: subprocess.Popen) -> list[tuple[int, str, str]]:
    """Wait for torchrun agents of one world, which wait for each other when their processes are done.

    Now and then one misses the other there and would stay for the five minutes that torch allows it: it is not waited
    for once the other has ended well.
    """
    deadline = time.monotonic() + 120
    while all(agent.poll() is None for agent in agents) and time.monotonic() < deadline:
        time.sleep(0.1)
    ended = []
    for agent in agents:
        try:
            out, err = agent.communicate(timeout=20)
            ended.append((agent.returncode, out, err))
        except subprocess.TimeoutExpired:
            assert not family(agent), "its processes have not ended"
            agent.kill()
            ended.append((0, *agent.communicate()))
    assert any(agent.returncode == 0 for agent in agents)
    return ended


def begin(*command: str, cwd: Path, **extra: str) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(**extra),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell that runs the tests in the background has had SIGINT ignored for all of them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def free_port() -> int:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store.port


def torchrun(*arguments: str) -> list[str]:
    return [str(BIN / "torchrun"), *arguments, LAUNCH]


def slurm_task(rank: int) -> dict[str, str]:
    return {
        "SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0",
        "SLURM_STEP_ID": "0", "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost", "SLURM_CPUS_PER_TASK": "1",
    }  # fmt: skip


def two_nodes() -> list[tuple[list[str], dict[str, str]]]:
    port = free_port()
    shared = ("--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}")
    return [(torchrun(*shared, f"--node-rank={node}"), {}) for node in (0, 1)]


# way -> commands that are started together, each with what stands in its environment
WAYS = {
    "plain python, config": lambda: [([sys.executable, LAUNCH, "--config", MULTI_CPU], {})],
    "plain python, number": lambda: [([sys.executable, LAUNCH, "--num-processes", "2"], {})],
    "nested in accelerate launch": lambda: [
        ([str(BIN / "accelerate"), "launch", LAUNCH, "--config", MULTI_CPU], {})
    ],
    "accelerate launch with the config": lambda: [
        ([str(BIN / "accelerate"), "launch", "--config_file", MULTI_CPU, LAUNCH], {})
    ],
    "torchrun": lambda: [(torchrun("--standalone", "--nproc-per-node=2"), {})],
    "torchrun, cpu asked for": lambda: [
        (torchrun("--standalone", "--nproc-per-node=2"), {"ACCELERATE_USE_CPU": "true"})
    ],
    "two torchrun agents": two_nodes,
    "slurm tasks": lambda: [([sys.executable, LAUNCH], slurm_task(rank)) for rank in (0, 1)],
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_way_to_start_two_processes(way, images, tmp_path):
    started = [
        begin(*command, *QUICK, str(images), *ONCE, "--run-dir", "run", cwd=tmp_path, **extra)
        for command, extra in WAYS[way]()
    ]
    ended = finish_agents(*started) if "agents" in way else finish(*started)
    assert [code for code, _, _ in ended] == [0] * len(ended), ended
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["world_size"], summary["epochs"], summary["device"]) == (
        "completed",
        2,
        1,
        "cpu",
    )
    assert summary["test"]["num_samples"] == sum(map(sum, summary["test"]["confusion_matrix"])) == 7
    cores = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)
    assert summary["num_threads"] == max(1, cores // (1 if way == "two torchrun agents" else 2))
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert (record["step"], record["world_size"]) == (4, 2)
    printed = "".join(out for _, out, _ in ended)
    assert printed.count("4 per device x 2 processes") == 1, "not one rank alone talks"
    assert printed.count("Training completed after 1 of 1 epochs") == 1
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["last.pt"]


def test_a_mistake_has_one_line_and_code_2_and_one_found_by_rank_0_too(images, tmp_path):
    command = (sys.executable, LAUNCH, "--num-processes", "2", *QUICK, str(images), *ONCE)
    before = begin(*command, "--set", "global_batch_size=9", "--dataset", "shapes", cwd=tmp_path)
    (tmp_path / "empty").mkdir()
    during = begin(*command, "--dataset", "empty", cwd=tmp_path)
    # torchrun ends all as soon as one has ended: rank 0 comes last, and is heard all the same.
    late = tmp_path / "late.py"
    late.write_text(
        "import os, runpy, time\n"
        "if os.environ['RANK'] == '0':\n"
        "    time.sleep(3)\n"
        f"runpy.run_path({LAUNCH!r}, run_name='__main__')\n"
    )
    agent = (str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", str(late))
    nobody = begin(*agent, "--epoch", "3", cwd=tmp_path)
    (code, out, err), (code_during, out_during, err_during), (_, _, err_nobody) = finish(before, during, nobody)
    assert (code, out) == (2, "")
    assert err == "error: global_batch_size=9 does not divide by 2 processes x 1 accumulation: set it to 8 or 10\n"
    assert (code_during, out_during) == (2, "")
    assert err_during.startswith("error: ") and err_during.count("\n") == 1
    assert err_nobody.count("error: unknown argument '--epoch', did you mean '--epochs'?") == 1
    assert not (tmp_path / "runs").exists()


def wait_for(condition, process: subprocess.Popen, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


def family(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_rank_and_the_run_goes_on_where_it_was(number, images, tmp_path):
    long = (*QUICK, str(images), "--run-dir", "run", "--epochs")
    process = begin(sys.executable, LAUNCH, "--config", MULTI_CPU, *long, "100000", cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process)
    started = family(process)
    process.send_signal(number)
    ((code, _, err),) = finish(process)
    assert code == 75, err
    line = err.strip().splitlines()[-1]
    assert line.startswith("interrupted in epoch ")
    assert line.endswith(f"and saved; go on with: python {ROOT / 'launch.py'} --config {MULTI_CPU} --resume run")
    assert not [one for one in started if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    done = summary["epochs"]
    again = begin(
        sys.executable, LAUNCH, "--num-processes", "2", "--resume", "run", "--epochs", str(done + 2), cwd=tmp_path
    )
    ((code, out, err),) = finish(again)
    assert code == 0, err
    assert "going on after step" in out
    epochs = [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()]
    assert epochs == list(range(1, done + 3))


def test_a_second_ctrl_c_ends_everything_at_once(images, tmp_path):
    process = begin(
        sys.executable, LAUNCH, "--num-processes", "2", *QUICK, str(images), "--run-dir", "run", "--epochs", "100000",
        cwd=tmp_path,
    )  # fmt: skip
    summary = tmp_path / "run" / "summary.json"
    wait_for(summary.exists, process)
    started = family(process)
    for one in started:
        one.suspend()  # so that none can answer the first
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)  # two signals at once would be one
    process.send_signal(signal.SIGINT)
    ((code, _, _),) = finish(process, timeout=20)
    assert code == 130
    assert not [one for one in started if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_a_signal_before_training_ends_it_with_75(images, tmp_path):
    process = begin(sys.executable, LAUNCH, "--num-processes", "2", *QUICK, str(images), *ONCE, cwd=tmp_path)
    wait_for(lambda: len(family(process)) >= 1, process)
    process.send_signal(signal.SIGTERM)  # torch's agent has hardly begun
    ((code, _, _),) = finish(process, timeout=30)
    assert code == 75
    assert not (tmp_path / "runs").exists()


def test_a_launcher_that_is_killed_leaves_nothing_behind(images, tmp_path):
    process = begin(
        sys.executable, LAUNCH, "--num-processes", "2", *QUICK, str(images), "--run-dir", "run", "--epochs", "100000",
        cwd=tmp_path,
    )  # fmt: skip
    wait_for((tmp_path / "run" / "metrics.jsonl").exists, process)
    started = family(process)
    assert len(started) >= 3
    process.kill()
    _, alive = psutil.wait_procs(started, timeout=30)
    for one in alive:
        one.kill()
    finish(process)
    assert not alive


def test_data_that_differs_between_ranks_is_refused(images, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from cifar_dist.data.dataset import Dataset\n"
        "    Dataset.fingerprint = lambda dataset: 'another'\n"
    )
    command = (sys.executable, LAUNCH, "--num-processes", "2", *QUICK, str(images), *ONCE, "--run-dir", "run")
    ((code, _, err),) = finish(begin(*command, cwd=tmp_path, PYTHONPATH=str(tmp_path)))
    assert code == 2
    assert "is not the same on" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_rank_0_that_fails_takes_the_others_with_it_and_says_why(images, tmp_path):
    """The disk is full when rank 0 writes, and the others are in the next collective."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '0':\n"
        "    real = os.fsync\n"
        "    def fsync(descriptor):\n"
        "        if os.path.exists('run/metrics.jsonl') and os.path.getsize('run/metrics.jsonl'):\n"
        "            raise OSError(28, 'No space left on device')\n"
        "        real(descriptor)\n"
        "    os.fsync = fsync\n"
    )
    process = begin(
        sys.executable, LAUNCH, "--num-processes", "2", *QUICK, str(images), "--run-dir", "run", "--epochs", "100000",
        cwd=tmp_path, PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    ((code, _, err),) = finish(process, timeout=100)
    assert code == 1
    assert "No space left on device" in err
    assert "rank 1 ends: another process is gone" in err
    assert err.index("No space left on device") < err.index("rank 1 ends")


def test_a_killed_rank_is_restarted_by_torchrun_and_the_run_goes_on(images, tmp_path):
    """With c10d, which starts all ranks again; the same command, with --resume, starts and goes on."""
    process = begin(
        *torchrun("--nproc-per-node=2", "--max-restarts=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
        *QUICK, str(images), "--run-dir", "run", "--resume", "--epochs", "12", "--checkpoint-every-steps", "1",
        cwd=tmp_path, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process)
    (rank,) = [one for one in family(process) if one.environ().get("RANK") == "0"]  # it has the lock
    rank.kill()
    ((code, out, err),) = finish(process)
    assert code == 0, err
    assert out.count("going on after step") == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"
    assert [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()] == list(range(1, 13))
    assert not (tmp_path / "run" / ".lock").exists()
