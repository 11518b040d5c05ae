"""``python -m benchmarks.static``: see :mod:`benchmarks.static.run`."""

import sys

from .run import main  # not here: its processes import what they run by the module's name

if __name__ == "__main__":
    sys.exit(main())
