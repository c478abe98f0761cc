"""`python -m cifar_dist` is `python launch.py`."""

import sys

from cifar_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
