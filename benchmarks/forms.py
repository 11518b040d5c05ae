"""``python -m benchmarks.forms``: see :mod:`benchmarks.losses.forms`."""

import sys

from .losses.forms import main

if __name__ == "__main__":
    sys.exit(main())
