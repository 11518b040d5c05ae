"""A store that nothing interrupted, which others must equal."""

import pytest

from tests.support.stored_teachers import TOPK, save, snapshot


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("uninterrupted") / "store"
    save(path, TOPK)
    return snapshot(path)
