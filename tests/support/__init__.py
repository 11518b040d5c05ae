"""What the tests share: inputs, rules, formulas, and the mutations."""

import importlib
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]  # of the repository
FULL_VARIABLE = "DISTILL_OPS_FULL"


def full():
    """Whether this is `make test-full`, where nothing that can be installed may be missing."""
    return os.environ.get(FULL_VARIABLE) == "1"


def optional(name):
    """The module of that name; where it is not installed the test is skipped, or fails if full."""
    return importlib.import_module(name) if full() else pytest.importorskip(name)
