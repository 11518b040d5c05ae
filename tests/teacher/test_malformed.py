"""Each malformed store is a ValueError that names the file and what is wrong with it."""

import re
import shutil

import pytest

from distill_ops import TeacherTopKDataset
from tests.teacher.malformed import CASES, FILES, VALUES, write_store


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "store"
    write_store(folder)
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed(whole, tmp_path, case):
    path = tmp_path / "store"
    shutil.copytree(whole, path)
    TeacherTopKDataset(path).verify()
    case.spoil(path)
    if case.verify:
        dataset = TeacherTopKDataset(path)
    with pytest.raises(ValueError, match=case.message) as caught:
        dataset.verify() if case.verify else TeacherTopKDataset(path)
    assert type(caught.value) is ValueError
    assert re.match(rf"{path}\S*{case.file}|{path} is", str(caught.value))
    assert len(str(caught.value)) < 2500


def test_the_table():
    assert len({case.name for case in FILES}) == len(FILES)
    assert len(CASES) >= 60
    assert len(VALUES) >= 10
