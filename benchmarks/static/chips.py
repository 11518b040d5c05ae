"""The GPUs that the static predictions are for, as their vendors describe them.

Bandwidths and clocks are nominal: a chip under a power limit runs below its clock, and a copy
reaches 85 to 93% of the bandwidth. Sizes of caches and numbers of multiprocessors are those that the
launch choices see (``distill_ops.analysis.aot.TARGETS``).
"""

from dataclasses import dataclass

from distill_ops.kernels.launch import DeviceFacts

from distill_ops.analysis import aot


@dataclass(frozen=True)
class Chip:
    """Rates are a clock and a multiprocessor (a compute unit on AMD).

    Attributes:
        device: what the driver calls it; its variants with other clocks and memories have other names.
        target: the name of its architecture in ``aot.TARGETS``.
        clock_ghz: the highest clock.
        gb_per_s: nominal bandwidth of device memory, 1e9 bytes a second.
        lanes: lane-instructions issued.
        special: results of exp, log and reciprocal.
        floats: float32 additions, multiplications or multiply-adds; None: as many as ``lanes``.
        special_stalls: exp and log occupy the vector unit itself, so that nothing else issues.
        obeys_hints: its cache is known to have eviction priorities.
    """

    name: str
    device: str
    target: str
    clock_ghz: float
    gb_per_s: float
    lanes: int = 128
    special: int = 16
    floats: int | None = None
    special_stalls: bool = False
    obeys_hints: bool = True

    @property
    def facts(self) -> DeviceFacts:
        return aot.TARGETS[self.target].facts

    def picoseconds(self, clocks: float) -> float:
        """Time of so many clocks a multiprocessor, all of them at work."""
        return 1e3 * clocks / (self.facts.n_sm * self.clock_ghz)

    def memory_picoseconds(self, n_bytes: float) -> float:
        return 1e3 * n_bytes / self.gb_per_s

    def limits(self, n_bytes: float) -> dict[str, float]:
        """Lane-instructions and special results that fit into the time of moving ``n_bytes``."""
        clocks = self.memory_picoseconds(n_bytes) / self.picoseconds(1)
        return {"instructions": clocks * self.lanes, "special": clocks * self.special}


# Issue: four schedulers a multiprocessor, each a warp of 32 a clock (NVIDIA's A100, H100 and
# Blackwell whitepapers). 16 special results and 64 (A100) or 128 float32 operations a clock: CUDA C++
# Programming Guide, "Arithmetic Instructions". Clocks: A100 and H100 whitepapers; for H100 and H200
# it is the datasheet's 67 TFLOPS over 132 x 256; B200's is the highest that its driver reports.
# Bandwidths: datasheets of A100 80GB SXM, H100 SXM, H200 SXM and HGX B200.
# MI300X: datasheet (5.3 TB/s, 2100 MHz) and CDNA 3 whitepaper: a compute unit has four 16-lane
# vector units, each busy for 4 clocks with an instruction of 64 lanes, for 16 with an exp or a log;
# its last cache, the 256 MB Infinity Cache, stands at the memory side.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("A100", "NVIDIA A100-SXM4-80GB", "sm_80", 1.41, 2039, floats=64),
        Chip("H100", "NVIDIA H100 80GB HBM3", "sm_90", 1.98, 3350),
        Chip("H200", "NVIDIA H200", "sm_90", 1.98, 4800),
        Chip("B200", "NVIDIA B200", "sm_100", 1.965, 8000),
        Chip(
            "MI300X", "AMD Instinct MI300X", "gfx942", 2.1, 5300,
            lanes=64, special_stalls=True, obeys_hints=False,
        ),
    )
}  # fmt: skip


def chip_of(device_name: str) -> Chip | None:
    """The chip that a driver calls ``device_name``, or None."""
    return next((chip for chip in CHIPS.values() if chip.device == device_name), None)
