"""The list of mutations fits the sources, and the script tells killed from surviving."""

import pytest

from tests.support.mutants import PAGE, ROOT, TESTS_FAILED, Mutation, Outcome, page
from tests.support.mutations import MUTATIONS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_mutation_fits_the_sources(mutation):
    assert mutation.mistake(ROOT) is None
    file, name = mutation.test.split("[")[0].split("::")
    assert f"def {name}(" in (ROOT / file).read_text()


def test_names_are_unique():
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(MUTATIONS), "run: python -m tests.support.mutants --write"


def test_a_mutation_that_does_not_fit_is_named(tmp_path):
    (tmp_path / "source.py").write_text("a = 1\nb = 1\n")
    lost = Mutation("lost", "source.py", "a = 2", "a = 3", "")
    assert lost.mistake(tmp_path) == "lost: its old text occurs 0 times in source.py, not once"
    assert "occurs 2 times" in lost._replace(old="= 1").mistake(tmp_path)
    assert "changes nothing" in lost._replace(old="a = 1", new="a = 1").mistake(tmp_path)
    right = lost._replace(old="a = 1")
    assert right.mistake(tmp_path) is None
    right.apply(tmp_path)
    assert (tmp_path / "source.py").read_text() == "a = 3\nb = 1\n"


def test_only_a_failed_test_kills():
    """Exit status 2, 4 and 5 of pytest: an import that broke, an unknown test, none selected."""
    assert Outcome(TESTS_FAILED, "").killed()
    assert not any(Outcome(status, "").killed() for status in (-1, 0, 2, 3, 4, 5))
