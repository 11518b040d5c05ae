"""``python -m benchmarks.accuracy``: see :mod:`benchmarks.accuracy.sweep`."""

import sys

from .sweep import main  # not here: its processes import what they run by the module's name

if __name__ == "__main__":
    sys.exit(main())
