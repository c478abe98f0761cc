"""Real processes: each way to start a world once, and each way in which a run of two processes ends."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore

from tests.commands.test_train import assert_same_run
from tests.conftest import ROOT, make_images
from tests.worlds.harness import run_ranks

BIN = Path(sys.executable).parent
LAUNCH, MULTI_CPU = str(ROOT / "launch.py"), str(ROOT / "accelerate_configs" / "multi_cpu.yaml")
QUICK = (
    "--recipe", "original", "--dataset", "images", "--precision", "no",
    "--set", "global_batch_size=8", "stem=small", "image_size=16", "early_stopping.enabled=false",
)  # fmt: skip
FOREVER = ("--epochs", "100000")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of images, and of all that a run leaves."""
    make_images(tmp_path / "images")
    return tmp_path


def begin(*command: str, cwd: Path, **environ: str) -> subprocess.Popen:
    shell = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    shell |= {"PYTHONWARNINGS": "error::UserWarning:cifar_dist", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=shell | environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell that runs the tests in the background has had SIGINT ignored for all of them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def family(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def ranks(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that train, rank 0 first."""
    found = {one.environ().get("RANK", ""): one for one in family(process)}
    return [found[rank] for rank in sorted(found) if rank]


def finish(*processes: subprocess.Popen) -> list[tuple[int, str, str]]:
    """Wait for processes; return for each its exit code and what it printed."""
    try:
        ended = [(*process.communicate(timeout=100), process.returncode) for process in processes]
        return [(code, out, err) for out, err, code in ended]
    finally:
        for process in processes:
            if process.poll() is None:
                for one in [*family(process), process]:
                    one.kill()


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def epochs_of(run: Path) -> list[int]:
    metrics = run / "metrics.jsonl"
    return [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()] if metrics.exists() else []


def assert_trained_by_two(run: Path, printed: str, *, processes_here: int = 2) -> None:
    """A run of one epoch was trained by a world of two, of which rank 0 alone printed."""
    summary, record = summary_of(run), json.loads((run / "metrics.jsonl").read_text())
    found = tuple(summary[name] for name in ("status", "world_size", "epochs", "device"))
    assert found == ("completed", 2, 1, "cpu")
    assert summary["test"]["num_samples"] == sum(map(sum, summary["test"]["confusion_matrix"])) == 7
    cores = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)
    assert summary["num_threads"] == max(1, cores // processes_here)
    assert (record["step"], record["world_size"]) == (4, 2)
    assert printed.count("4 per device x 2 processes") == 1
    assert printed.count("Training completed after 1 of 1 epoch") == 1


@pytest.mark.parametrize(
    "command", [("launch", LAUNCH, "--config", MULTI_CPU), ("launch", "--config_file", MULTI_CPU, LAUNCH)]
)
def test_accelerate_launch_starts_two_processes(folder, command):
    process = begin(str(BIN / "accelerate"), *command, *QUICK, "--epochs", "1", "--run-dir", "run", cwd=folder)
    ((code, out, err),) = finish(process)
    assert code == 0, err
    assert_trained_by_two(folder / "run", out)


def test_two_machines_are_one_world(folder):
    port = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    machines = []
    for rank in (0, 1):
        (folder / f"machine{rank}.yaml").write_text(
            "distributed_type: MULTI_GPU\nuse_cpu: true\nnum_machines: 2\nnum_processes: 2\n"
            f"machine_rank: {rank}\nmain_process_ip: 127.0.0.1\nmain_process_port: {port}\n"
        )
        command = ("--config", f"machine{rank}.yaml", *QUICK, "--epochs", "1", "--run-dir", "run")
        machines.append(begin(sys.executable, LAUNCH, *command, cwd=folder))
    ended = finish(*machines)
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert_trained_by_two(folder / "run", "".join(out for _, out, _ in ended), processes_here=1)


def test_torchrun_restarts_a_killed_rank_and_the_run_goes_on(folder):
    """With c10d, which starts all ranks again; the same command, with --resume, starts and goes on."""
    process = begin(
        str(BIN / "torchrun"), "--nproc-per-node=2", "--max-restarts=2", "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0", LAUNCH, *QUICK, "--run-dir", "run", "--resume", "--epochs", "12",
        "--checkpoint-every-steps", "4",
        cwd=folder, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    run = folder / "run"
    wait_for(lambda: len(epochs_of(run)) >= 2, process)
    ranks(process)[0].kill()  # it has the lock
    ((code, out, err),) = finish(process)
    assert code == 0, err
    assert out.count("resumed in epoch") == 1
    assert (summary_of(run)["status"], summary_of(run)["world_size"]) == ("completed", 2)
    assert epochs_of(run) == list(range(1, 13))


def test_a_run_goes_on_with_the_same_bits_however_its_processes_were_ended(folder):
    """By each signal, by SIGKILL for the launcher, and by SIGKILL for rank 0 as it writes a checkpoint."""
    run, everything = folder / "run", ("ema_decay=0.9", "optimizer.nesterov=true", "augmentation.mixup=0.5")

    def start(*arguments: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
        """Start the run or go on with it, and wait until it has trained for two epochs more."""
        before = len(epochs_of(run))
        process = begin(sys.executable, LAUNCH, *arguments, cwd=folder, OMP_NUM_THREADS="1")
        wait_for(lambda: len(epochs_of(run)) >= before + 2, process)
        return process, family(process)

    def assert_nobody_is_left(started: list[psutil.Process]) -> None:
        _, alive = psutil.wait_procs(started, timeout=30)
        for one in alive:
            one.kill()
        assert not alive

    again = ("--num-processes", "2", "--resume", "run")
    first = ("--config", MULTI_CPU, *QUICK, *everything, "--run-dir", "run", *FOREVER)
    for arguments, number in ((first, signal.SIGINT), (again, signal.SIGTERM), (again, signal.SIGUSR2)):
        process, started = start(*arguments)
        process.send_signal(number)
        ((code, out, err),) = finish(process)
        assert code == 75, err
        assert ("resumed in epoch" in out) == (arguments is again)
        line, command = err.strip().splitlines()[-1], shlex.join([LAUNCH, *arguments[:2], "--resume", "run"])
        assert line.startswith("interrupted in epoch ")
        assert line.endswith(f"and saved; resume with: python {command}")
        assert_nobody_is_left(started)
        assert summary_of(run)["status"] == "interrupted"

    process, started = start(*again)
    process.kill()
    assert_nobody_is_left(started)
    finish(process)

    process, started = start(*again, "--checkpoint-every-steps", "1")
    writer = ranks(process)[0]
    wait_for(lambda: any((run / "checkpoints").glob(".*.tmp")), process)
    writer.kill()
    ((code, _, _),) = finish(process)
    assert code == 1
    assert_nobody_is_left(started)

    epochs = str(len(epochs_of(run)) + 1)
    whole = [*QUICK, *everything, "--epochs", epochs, "--config", MULTI_CPU]
    resumed, complete = (
        run_ranks(2, arguments, folder, OMP_NUM_THREADS="1")
        for arguments in ([*again[2:], "--epochs", epochs], [*whole, "--run-dir", "whole"])
    )
    assert [code for code, _, _ in (*resumed, *complete)] == [0] * 4, (resumed, complete)
    assert_same_run(str(folder / "whole"), str(run), epochs=int(epochs))
    assert not [path for path in run.rglob("*") if path.name.endswith(".tmp")]


def is_pending(number: int, process: psutil.Process) -> bool:
    """Return whether a signal has been sent to a suspended process."""
    (mask,) = re.findall(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_second_ctrl_c_ends_everything_at_once(folder):
    process = begin(sys.executable, LAUNCH, "--num-processes", "2", *QUICK, *FOREVER, cwd=folder)
    wait_for(lambda: len(ranks(process)) == 2, process)
    started = family(process)
    for one in ranks(process):
        one.suspend()  # so that none can answer the first
    process.send_signal(signal.SIGINT)
    wait_for(lambda: all(is_pending(signal.SIGINT, one) for one in ranks(process)), process)
    process.send_signal(signal.SIGINT)
    ((code, _, _),) = finish(process)
    assert code == 130
    assert not [one for one in started if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_a_signal_before_training_ends_it_with_75(folder):
    process = begin(sys.executable, LAUNCH, "--num-processes", "2", *QUICK, *FOREVER, cwd=folder)
    wait_for(lambda: len(family(process)) >= 1, process)
    process.send_signal(signal.SIGTERM)  # it has hardly begun
    ((code, _, _),) = finish(process)
    assert code == 75
    assert not (folder / "runs").exists()


def test_the_processes_of_each_seed_are_started_after_those_of_the_last(folder):
    command = (sys.executable, LAUNCH, "--num-processes", "2", "--seeds", "4,7", *QUICK, "--epochs", "2")
    ((code, _, err),) = finish(begin(*command, "--max-minutes", "0.001", cwd=folder))
    assert code == 75
    assert "seed 4 has not ended; resume all with: " in err.splitlines()[-1]
    ((code, out, err),) = finish(begin(*command, cwd=folder))
    assert code == 0, err
    assert "mean ± sd of 2 runs" in out
    for seed in (4, 7):
        summary = summary_of(folder / "runs" / f"original-images-seed{seed}")
        assert (summary["status"], summary["world_size"], summary["epochs"]) == ("completed", 2, 2)


def test_the_launcher_returns_the_code_of_a_mistake_that_it_or_its_ranks_find(folder):
    command = (sys.executable, LAUNCH, "--num-processes", "2", *QUICK)
    itself = begin(*command, "--set", "global_batch_size=9", cwd=folder)
    ((code, out, err),) = finish(itself)
    assert (code, out) == (2, "")
    assert err == "error: global_batch_size=9 does not divide by 2 processes x 1 accumulation: set it to 8 or 10\n"
    next(folder.glob("images/train/*/*.png")).write_text("no image")
    ((code, _, err),) = finish(begin(*command, cwd=folder))
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not (folder / "runs").exists()
