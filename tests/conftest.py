"""Which process runs what, and which cases wait for ``make test-full``.

Triton's interpreter is switched on when triton is imported, so the tests of the Triton kernels on
CPU tensors (marker ``interpreter``) need processes of their own: the suite starts one for each of
``SHARES`` beside itself and ``test_interpreter.py`` reports what they found. With a GPU the same
tests run on it, here. A run of the whole suite starts one more, for the folders ``BESIDE`` of the CPU
path, so that no process is the last one for long.

The marker ``full``, and what ``covering`` leaves out of a matrix, runs with ``--full``, with ``-m
full``, with ``DISTILL_OPS_FULL=1`` (which the first two set), and where a test is asked for by its id.
"""

import gc
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import chain

import pytest
import torch

from tests.support import FULL_VARIABLE, full
from tests.support.covering import mark_the_rest
from tests.support.interpreter import quicken
from tests.support.mutations import MUTATIONS

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and not INTERPRETING
REPORTERS = "test_kernels_under_the_interpreter", "test_the_folders_beside"

# what each process under the interpreter collects: about as long each
SHARES = {
    "losses": ["losses"],
    "others": ["oracle", "kernels", "interface", "tools", "vocab_parallel"],
}

BESIDE = ["compiled", "oracle", "teacher", "vocab_parallel"]

# the suite's processes share the cores, and threads that wait for each other keep them busy
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

if INTERPRETING and find_spec("triton"):
    quicken()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the cases marked full as well")


def pytest_configure(config):
    gc.disable()  # until the cases are collected
    if config.getoption("full") or "full" in config.getoption("markexpr").split():
        os.environ[FULL_VARIABLE] = "1"


def pytest_collection_modifyitems(config, items):
    mark_the_rest(items, pytest.mark.full, {mutation.test for mutation in MUTATIONS})
    selected, others = [], []
    for item in items:
        on_kernels = item.get_closest_marker("interpreter") is not None
        if on_kernels and item.path.parent.name not in chain.from_iterable(SHARES.values()):
            raise pytest.UsageError(f"no process of SHARES would run {item.nodeid}")
        if item.get_closest_marker("gpu"):
            wanted = HAS_GPU
        else:
            wanted = (INTERPRETING or HAS_GPU) if on_kernels else not INTERPRETING
        if item.get_closest_marker("full"):
            wanted = wanted and (full() or item.nodeid in config.args)
        (selected if wanted else others).append(item)
    selected.sort(
        key=lambda item: item.originalname in REPORTERS
    )  # last: their processes run meanwhile
    config.hook.pytest_deselected(items=others)
    items[:] = selected


def pytest_collection_finish(session):
    """Start the processes whose reports were collected, and leave to the one its folders."""
    config = session.config
    config.processes, config.beside = {}, []
    gc.enable()
    gc.freeze()  # thousands of cases, which every collection of garbage would go through
    if config.option.collectonly or INTERPRETING or HAS_GPU:
        return
    reporters = [item for item in session.items if item.originalname in REPORTERS]
    for share in [x.callspec.params["share"] for x in reporters if hasattr(x, "callspec")]:
        config.processes[share] = start(config, SHARES[share], {"TRITON_INTERPRET": "1"})
    whole = config.args_source is config.ArgsSource.TESTPATHS
    if whole and any(not hasattr(x, "callspec") for x in reporters):
        config.processes["beside"] = start(config, BESIDE, {})
        config.beside = [x for x in session.items if x.path.parent.name in BESIDE]
        config.hook.pytest_deselected(items=config.beside)
        session.items[:] = [x for x in session.items if x.path.parent.name not in BESIDE]


def start(config, folders, environment):
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        + [f"tests/{folder}" for folder in folders],
        cwd=config.rootpath,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: os.nice(5),  # this process, the longest, has a core to itself
    )


def pytest_unconfigure(config):
    for process in getattr(config, "processes", {}).values():
        if process.poll() is None:
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
