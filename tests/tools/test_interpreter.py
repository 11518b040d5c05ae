"""The Triton kernels on CPU tensors, in the processes that conftest.py started."""

import pytest

from tests.conftest import HAS_GPU, INTERPRETING, SHARES


@pytest.mark.skipif(HAS_GPU or INTERPRETING, reason="the kernels' tests run in this process")
@pytest.mark.parametrize("share", SHARES)
def test_kernels_under_the_interpreter(share, request):
    process = request.config.interpreter_processes[share]
    output, _ = process.communicate()
    print(output[-2000:])
    assert process.returncode == 0, output[-6000:]
    assert " passed" in output.splitlines()[-1]
