"""A Slurm cluster of two nodes for the tests of this folder."""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("cluster.sh")
# A job in one of these stays there unless somebody requeues it.
FINAL_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}
SETTINGS_OF_SLURM = ("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SCANCEL_", "SQUEUE_", "SINFO_")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(SCRIPT.parent):
            item.add_marker("slurm")


def without_slurm() -> dict[str, str]:
    """This process's environment, as if no Slurm had put anything there."""
    return {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS_OF_SLURM)}


def read_jobs(text: str) -> list[dict[str, str]]:
    """What `scontrol show job -o` prints, a job a line: fields `Name=value`, whose values may have blanks."""
    fields = re.compile(r"(?:^| )([A-Z][\w/:]*)=(.*?)(?= [A-Z][\w/:]*=|\s*$)")
    return [dict(fields.findall(line)) for line in text.splitlines() if line.startswith("JobId=")]


def read_log(job: dict[str, str]) -> str:
    """What a batch job has printed so far; empty where it has no file yet."""
    files = dict.fromkeys(Path(job[name]) for name in ("StdOut", "StdErr") if name in job)
    return "".join(file.read_text(errors="replace") for file in files if file.is_file())


def story(job: dict[str, str]) -> str:
    state = "{JobState} ({Reason}), exit code {ExitCode}, restarts {Restarts}".format_map(job)
    return f"\njob {job['JobId']}: {state}; its log:\n{read_log(job) or '(none)'}"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster that is up: partitions `main`, the default, and `high`, which preempts it."""

    folder: Path
    crashed: set[str] = field(default_factory=set)

    @property
    def environ(self) -> dict[str, str]:
        """What os.environ needs, so that sbatch, srun and scontrol reach this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    @property
    def nodes(self) -> list[str]:
        """The nodes' names; `crash` and `restore` take them, and n1 and n2."""
        return (self.folder / "nodes").read_text().split()

    def run(
        self, *command: str | Path, cwd: Path | None = None, timeout: float = 120, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command that sees the cluster; the caller looks at its exit code."""
        return subprocess.run(
            command,
            cwd=cwd,
            env=without_slurm() | self.environ | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def submit(self, *sbatch_arguments: str | Path, cwd: Path, **env: str) -> str:
        """Submit a batch job; give its number."""
        submitted = self.run("sbatch", "--parsable", *sbatch_arguments, cwd=cwd, **env)
        assert submitted.returncode == 0, submitted.stderr
        return submitted.stdout.strip().partition(";")[0]

    def jobs(self, job_id: str) -> list[dict[str, str]]:
        """The fields that scontrol shows of a job, or of each task of an array."""
        shown = self.run("scontrol", "show", "job", "-o", job_id)
        jobs = read_jobs(shown.stdout)
        assert shown.returncode == 0 and jobs, shown.stdout + shown.stderr
        return jobs

    def job(self, job_id: str) -> dict[str, str]:
        """The same of what is one job."""
        (job,) = self.jobs(job_id)
        return job

    def wait(self, job_id: str, *states: str, timeout: float = 60) -> list[dict[str, str]]:
        """Wait until a job, or each task of an array, is in one of the states; give their fields."""
        return self.wait_until(job_id, " or ".join(states), lambda job: job["JobState"] in states, timeout)

    def wait_for_log(self, job_id: str, text: str, timeout: float = 60) -> list[dict[str, str]]:
        """Wait until a job's output has this text."""
        return self.wait_until(job_id, f"{text!r} in the log", lambda job: text in read_log(job), timeout)

    def wait_until(
        self, job_id: str, what: str, holds: Callable[[dict[str, str]], bool], timeout: float = 60
    ) -> list[dict[str, str]]:
        """Wait for what the fields of a job tell.

        Fails with states and logs when the time is over, and at once when a job has ended without it.
        """
        start = time.monotonic()
        while True:
            jobs = self.jobs(job_id)
            others = [job for job in jobs if not holds(job)]
            if not others:
                return jobs
            waited = time.monotonic() - start
            if waited > timeout or any(job["JobState"] in FINAL_STATES for job in others):
                pytest.fail(f"no {what} after {waited:.0f} s" + "".join(map(story, others)))
            time.sleep(0.1)

    def crash(self, node: str) -> None:
        """Kill all that runs on a node, its daemon too, as a power cut would."""
        self.crashed.add(node)
        succeed(control(self.folder, "crash", node))

    def restore(self, node: str) -> None:
        """Boot a crashed node and wait until it takes jobs."""
        succeed(control(self.folder, "return", node))
        self.crashed.discard(node)

    def clear(self) -> None:
        """Restore the nodes and end the jobs that a test left."""
        for node in list(self.crashed):
            self.restore(node)
        deadline = time.monotonic() + 60
        while jobs := self.run("squeue", "--noheader", "--format=%A").stdout.split():
            assert time.monotonic() < deadline, f"these jobs do not end: {jobs}"
            self.run("scancel", *jobs)
            time.sleep(0.2)


def control(folder: Path, *command: str, **settings: str) -> subprocess.CompletedProcess[str]:
    env = without_slurm() | {"TEST_CLUSTER_DIR": str(folder)} | settings
    return subprocess.run([SCRIPT, *command], env=env, capture_output=True, text=True, timeout=300, check=False)


def succeed(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes of 64 pretended CPUs and 8 GPUs; skips where Slurm is not installed or may not be started."""
    # Not pytest's own folder: the path of a unix socket may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        up = control(folder, "up", TEST_CLUSTER_GPUS="8", TEST_CLUSTER_CPUS="64")
        if up.returncode == 3:
            pytest.skip(up.stderr.strip())
        succeed(up)
        yield Cluster(folder=folder)
    finally:
        succeed(control(folder, "down"))
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def cleared(request) -> Iterator[None]:
    """The next test finds two nodes and no jobs."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").clear()
