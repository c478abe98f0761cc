"""The environment in which tests run. Imported before torch, by tests/conftest.py."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
KEPT = ("PATH", "TMPDIR", "TZ", "USER", "LOGNAME", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CIFAR_DIST_TEST_DATA")


def _reset_signals() -> None:
    """Handle signals as in a terminal: nohup and shells that start jobs in the background have some ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGHUP", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)


def _isolate_environment() -> None:
    """Remove every variable that a test did not set, before torch is imported, and handle signals as in a terminal.

    Launchers, Slurm jobs, notebooks and CI set variables that change what the program does. The home folder is an
    empty one of its own, so that no user's config or cache is read. Workers of pytest-xdist inherit the result.
    """
    if "CIFAR_DIST_TEST_HOME" in os.environ:
        return
    for name in set(os.environ) - set(KEPT):
        if not name.startswith(("PYTEST_", "COV_")):
            del os.environ[name]
    _reset_signals()
    home = tempfile.mkdtemp(prefix="cifar-dist-home-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    os.environ |= {
        "CIFAR_DIST_TEST_HOME": home,
        "HOME": home,
        "PYTHONPATH": str(ROOT),  # processes that tests start run this checkout
        "TERM": "xterm-256color",
        "OMP_NUM_THREADS": "1",  # workers share the cores
        "GOMP_SPINCOUNT": "10000",  # as the launcher sets it
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # as the launcher sets it
        "CIFAR_DIST_CIFAR10_URLS": "http://127.0.0.1:9/cifar-10-python.tar.gz",  # nothing is downloaded
        "CIFAR_DIST_CIFAR100_URLS": "http://127.0.0.1:9/cifar-100-python.tar.gz",
    }


_isolate_environment()
