"""``python -m benchmarks.parallel``: see :mod:`benchmarks.losses.parallel`."""

import sys

from .losses.parallel import main

if __name__ == "__main__":
    sys.exit(main())
