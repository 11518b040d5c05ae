"""A plugin of pytest: as many tests as fit into some seconds, one of each function first.

    python -m pytest -p benchmarks.gpu.budget --budget 60

Tests that no time was left for are counted and do not fail the run; a run without any test does.
With pytest-xdist each worker has the seconds for its share.
"""

import random
import time
from collections import defaultdict
from itertools import zip_longest

import pytest


def pytest_addoption(parser):
    parser.addoption("--budget", type=float, metavar="SECONDS", help="start no test after these")


def breadth_first(items: list) -> list:
    """One test of each function, then a second of each, and so on: of a function's tests in an order
    that is arbitrary, but the same in every run."""
    functions = defaultdict(list)
    for item in items:
        functions[item.nodeid.partition("[")[0]].append(item)
    for tests in functions.values():
        random.Random(0).shuffle(tests)
    rounds = zip_longest(*functions.values())
    return [item for tests in rounds for item in tests if item is not None]


class _Budget:
    def __init__(self, seconds: float):
        self.seconds, self.began = seconds, time.monotonic()
        self.started = self.left_out = 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = breadth_first(items)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item, nextitem):
        if time.monotonic() - self.began < self.seconds:
            self.started += 1
            return None
        self.left_out += 1
        return True  # taken care of

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist's
            session.config.workeroutput["budget"] = (self.started, self.left_out)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error):
        started, left_out = getattr(node, "workeroutput", {}).get("budget", (0, 0))
        self.started += started
        self.left_out += left_out

    def pytest_terminal_summary(self, terminalreporter):
        if self.left_out:
            terminalreporter.write_line(
                f"time for {self.started} tests in {self.seconds:g} s; {self.left_out} left out"
            )


def pytest_configure(config):
    if config.getoption("budget") is not None:
        config.pluginmanager.register(_Budget(config.getoption("budget")))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if session.testscollected and not session.testsfailed and session.exitstatus == 0:
        ran = session.config.pluginmanager.get_plugin("terminalreporter")
        if ran is not None and not any(ran.stats.get(x) for x in ("passed", "skipped", "xfailed")):
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
