"""The counts of :mod:`sass`, for AMD: from the assembly text, there being no disassembler here.

Counted are the instructions of the vector unit: scalar, memory and waiting instructions issue
beside it, from other wavefronts. A packed instruction works on two columns.
"""

from . import aot, forms, sass

# AMD's opcodes for the NVIDIA ones that sass.Loop counts
OPCODES = {
    "MUFU": ("v_exp_f32", "v_log_f32", "v_rcp_f32"),
    "LDG": ("global_load", "buffer_load"),
    "STG": ("global_store", "buffer_store"),
    "BAR": ("s_barrier", "ds_"),
}
LOADED = {"dwordx4": 16, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "ubyte": 1}


class Loop(sass.Loop):
    """An innermost loop in AMD's assembly."""

    def count(self, *prefixes: str) -> int:
        return super().count(*(name for p in prefixes for name in OPCODES.get(p, (p,))))

    @property
    def instructions(self) -> int:
        return super().count("v_")

    @property
    def bytes_loaded(self) -> int:
        loads = [(o, n) for o, n in self.opcodes.items() if o.startswith(OPCODES["LDG"])]
        return sum(n * LOADED.get(opcode.split("_")[2], 2) for opcode, n in loads)

    @property
    def guarded(self) -> bool:
        """Whether it compares with infinity, as the guarded sweeps do."""
        return super().count("v_cmp_eq_f32", "v_cmp_neq_f32", "v_cmp_class_f32") > 0

    @property
    def narrow_accesses(self) -> int:
        wide = sum(n for opcode, n in self.opcodes.items() if opcode.endswith("_dwordx4"))
        return self.count("LDG", "STG") - wide


SYNTAX = sass.Syntax(
    label=r"(\.LBB\w+):",
    place=r"\t\.loc\s.*;\s+([^\s:]+):(\d+)",
    instruction=r"\t([a-z]\w*)(?:\s+(\.LBB\w+))?",
)


def innermost_loops(text: str) -> list[Loop]:
    """Loops that hold no other loop, in program order."""
    return sass.innermost_loops(text.splitlines(), SYNTAX, Loop)


def count(launch: aot.Launch, target: aot.Target) -> forms.Counts:
    """Compile a launch of the dense kernel for an AMD target and count its loops."""
    compiled = aot.compile_launch(launch, target)
    loops = innermost_loops(compiled.asm["amdgcn"])
    counts = forms.counts_of(launch, loops, sass.amd_usage(compiled))
    # a peeled end is broken into a branch a column, parts of which look like loops of their own
    for found in counts.sweeps.values():
        found.sort(key=lambda loop: loop.narrow_accesses > 0)
    return counts
