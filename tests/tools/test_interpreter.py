"""The Triton kernels on CPU tensors, in the processes that conftest.py started."""

import inspect

import pytest
import torch

from distill_ops import distillation_loss
from tests.conftest import HAS_GPU, INTERPRETING, SHARES
from tests.support.helpers import make_logits, run


@pytest.mark.skipif(HAS_GPU or INTERPRETING, reason="the kernels' tests run in this process")
@pytest.mark.parametrize("share", SHARES)
def test_kernels_under_the_interpreter(share, request):
    process = request.config.interpreter_processes[share]
    output, _ = process.communicate()
    print(output[-2000:])
    assert process.returncode == 0, output[-6000:]
    assert " passed" in output.splitlines()[-1]


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETING, reason="of the interpreter")
def test_the_quicker_interpreter_computes_the_same(monkeypatch):
    """Bit for bit what Triton's own computes, whose search ``support/interpreter.py`` replaces."""
    from triton.runtime import interpreter

    student, teacher = make_logits((3, 700), dtype=torch.bfloat16)
    call = lambda: run(
        distillation_loss, student, teacher, backend="triton", divergence="reverse_kl"
    )
    quick = call()
    monkeypatch.setattr(interpreter, "_patch_builtin", inspect.unwrap(interpreter._patch_builtin))
    assert all(map(torch.equal, quick, call()))
