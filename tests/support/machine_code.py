"""What tests of compiled kernels ask of a launch, and which of their cases wait for test-full."""

import pytest

pytest.importorskip("triton")

from distill_ops.analysis import aot, sass

# Each kernel is compiled for these in one form, and in the forms that kill a mutation; the other
# forms and chips are for `make test-full`, and `make static` counts them.
CHIPS = ("sm_90", "gfx942")


def some(cases, kept):
    """The cases, those that are not in ``kept`` marked full."""
    full = lambda case: pytest.param(
        *(case if isinstance(case, tuple) else [case]), marks=pytest.mark.full
    )
    return [case if case in kept else full(case) for case in cases]


def stack_and_loops(launched, target, wide=True):
    """Bytes of stack of a launch's code, and its innermost loops: none for AMD, whose code must have
    16-byte loads if ``wide``."""
    compiled = aot.compile_launch(launched, target)
    if target.backend == "hip":
        assert not wide or "global_load_dwordx4" in compiled.asm["amdgcn"]
        return sass.amd_usage(compiled).stack, []
    code, usage = sass.disassemble(compiled)
    return usage.stack, sass.innermost_loops(code)
