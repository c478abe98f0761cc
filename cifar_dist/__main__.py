"""`python -m cifar_dist` does what `python launch.py` does."""

import sys

from cifar_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
