"""Which process runs what.

Triton's interpreter is switched on when triton is imported, so the tests of the Triton kernels on
CPU tensors (marker ``interpreter``) need a process of their own: the suite starts it beside itself
and ``test_interpreter.py`` reports its outcome. With a GPU the same tests run on it, here.
"""

import os
import subprocess
import sys

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and not INTERPRETING
REPORTER = "test_kernels_under_the_interpreter"

if INTERPRETING:
    torch.set_num_threads(1)  # the suite's other process has the other cores


def pytest_collection_modifyitems(config, items):
    selected, others = [], []
    for item in items:
        on_kernels = item.get_closest_marker("interpreter") is not None
        if item.get_closest_marker("gpu"):
            wanted = HAS_GPU
        else:
            wanted = (INTERPRETING or HAS_GPU) if on_kernels else not INTERPRETING
        (selected if wanted else others).append(item)
    selected.sort(
        key=lambda item: item.originalname == REPORTER
    )  # last: its process runs meanwhile
    config.hook.pytest_deselected(items=others)
    items[:] = selected


def pytest_collection_finish(session):
    if any(item.originalname == REPORTER for item in session.items):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
        session.config.interpreter_process = subprocess.Popen(
            command,
            cwd=session.config.rootpath,
            env=os.environ | {"TRITON_INTERPRET": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def pytest_unconfigure(config):
    process = getattr(config, "interpreter_process", None)
    if process is not None and process.poll() is None:
        process.kill()


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def backend(request):
    """Each path that computes the loss here: the CPU path, and the Triton kernels."""
    return request.param


@pytest.fixture
def kernel_device():
    """The device on which a path is tested."""
    return lambda backend: "cuda" if backend == "triton" and HAS_GPU else "cpu"


@pytest.fixture
def device(backend, kernel_device):
    return kernel_device(backend)
