#!/usr/bin/env python3
"""The launcher: trains, evaluates and measures. `python launch.py --help` tells what it can do."""

import sys

from cifar_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
