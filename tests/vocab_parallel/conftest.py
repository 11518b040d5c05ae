"""The processes that the tests of this folder share."""

import pytest

from tests.support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    started = Ranks()
    yield started
    started.close()
