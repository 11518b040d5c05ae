"""``python -m benchmarks.gpu.measure``: how fast is it on this GPU? The dense losses, small shapes as
CUDA graphs, the other losses, and the static predictions beside them. Five minutes at most.

Output goes to a folder as it comes: ``measurements.log`` and ``measurements.json`` (how the stages
ended), and each stage's records, ``dense.json`` and so on.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from . import stages
from .stages import Stage

MINUTES = 5.0
# seconds of each stage at MINUTES; the rest is for starting and ending
LIMITS = {"dense": 95, "graphs": 45, "forms": 100, "beside": 15}
DENSE = (
    "--quick", "--losses", "forward_kl", "reverse_kl", "jensen_shannon",
    "--shapes", "4096x50257", "8192x128256", "--dtype", "bfloat16",
)  # fmt: skip


def all_stages(minutes: float, folder: Path) -> list[Stage]:
    folder = folder.absolute()  # stages run in the project's root
    commands = {
        "dense": ("benchmarks", *DENSE, "--json", str(folder / "dense.json")),
        "graphs": ("benchmarks.gpu.graphs", "--json", str(folder / "graphs.json")),
        "forms": ("benchmarks.forms", "--seconds", "2", "--json", str(folder / "forms.json")),
        "beside": ("benchmarks.gpu.beside", str(folder)),
    }
    return [
        Stage(name, LIMITS[name] * minutes / MINUTES, (sys.executable, "-m", *command))
        for name, command in commands.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    return stages.script(
        "benchmarks.gpu.measure", __doc__, "measurements", MINUTES, all_stages, arguments
    )


if __name__ == "__main__":
    sys.exit(main())
