#!/usr/bin/env python3
"""The launcher: trains, evaluates and measures. `python launch.py --help` tells what it can do."""

import sys

if __name__ == "__main__":
    try:
        from cifar_dist.cli import main
    except ModuleNotFoundError as error:  # a Python in which the project was not installed
        if (error.name or "").startswith("cifar_dist"):
            raise
        advice = "activate the virtual environment, or pip install -e ."
        print(f"error: {sys.executable} has no package {error.name}: {advice}", file=sys.stderr)
        sys.exit(2)
    sys.exit(main())
