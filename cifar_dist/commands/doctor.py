"""`doctor`: print this machine's devices and data, and what is missing."""

import os
import platform
from pathlib import Path

from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.cpus import usable_cores
from cifar_dist.config.errors import EXIT_DONE
from cifar_dist.config.options import DoctorOptions
from cifar_dist.config.provenance import command_line, git_commit, package_versions
from cifar_dist.config.recipe import DEFAULT_RECIPE, read_recipe, resolve_recipe
from cifar_dist.config.world import World
from cifar_dist.data.cifar import CIFAR10, CIFAR100, where_found
from cifar_dist.data.dataset import load_dataset
from cifar_dist.display.figures import describe_fonts
from cifar_dist.display.progress import loading_progress
from cifar_dist.display.terminal import make_console, print_header, print_notes
from cifar_dist.model.pretrained import imagenet_weights, imagenet_weights_path
from cifar_dist.run.resolve import DEFAULT_DATA_DIR, DEFAULT_DATASET
from cifar_dist.runtime.device import describe_devices


def run(options: DoctorOptions, world: World, config: AccelerateConfig) -> int:
    """Print the report, and download missing files if requested; return the exit code."""
    console = make_console(quiet=world.rank > 0)
    data_dir = (options.data_dir or DEFAULT_DATA_DIR).absolute()
    if options.download and world.rank == 0:
        with loading_progress(console, DEFAULT_DATASET) as progress:
            load_dataset(DEFAULT_DATASET, data_dir, resolve_recipe(read_recipe(DEFAULT_RECIPE)), progress=progress)
        imagenet_weights(note=lambda text: print_notes(console, [text]))
    print_header(
        console,
        _machine()
        | _data(data_dir)
        | {"fonts": describe_fonts()}
        | {"plan of a run": command_line("--dry-run"), "time of a run": command_line("--dry-run", "--measure")},
    )
    return EXIT_DONE


def _machine() -> dict[str, str]:
    versions, commit, cores = package_versions(), git_commit(), usable_cores()
    threads = os.environ.get("OMP_NUM_THREADS")
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, Python {versions.pop('python')}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items())
        + (f" (commit {commit[:12]})" if commit else ""),
        "processor": f"{cores} core{'s' if cores > 1 else ''} for this process"
        + (f", OMP_NUM_THREADS={threads}" if threads else ""),
        **describe_devices(),
    }


def _data(data_dir: Path) -> dict[str, str]:
    path = imagenet_weights_path()
    return {
        "cifar10": where_found(CIFAR10, data_dir),
        "cifar100": where_found(CIFAR100, data_dir),
        "ImageNet weights": f"found: {path}" if path.exists() else f"missing: {path} (for --recipe finetune)",
    }
