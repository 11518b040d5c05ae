"""What the processes that conftest.py started found: under the interpreter, and on the CPU path."""

import pytest

from tests.conftest import HAS_GPU, INTERPRETING, SHARES


def assert_passed(process):
    output, _ = process.communicate()
    print(output[-2000:])
    assert process.returncode == 0, output[-6000:]
    assert " passed" in output.splitlines()[-1]


@pytest.mark.skipif(HAS_GPU or INTERPRETING, reason="the kernels' tests run in this process")
@pytest.mark.parametrize("share", SHARES)
def test_kernels_under_the_interpreter(share, request):
    assert_passed(request.config.processes[share])


def test_the_folders_beside(request):
    if "beside" not in request.config.processes:
        pytest.skip("not a run of the whole suite: they run in this process, if any")
    assert_passed(request.config.processes["beside"])
