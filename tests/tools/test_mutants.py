"""The list of mutations fits the sources, and the script tells killed from surviving."""

import pytest

from tests.support import ROOT, full
from tests.support.mutants import PAGE, TESTS_FAILED, Mutation, Outcome, page, uncollected
from tests.support.mutations import MUTATIONS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_mutation_fits_the_sources(mutation):
    assert mutation.mistake(ROOT) is None


HERE = "tests/tools/test_mutants.py::"


@pytest.mark.parametrize(
    "interpreter",
    [
        pytest.param(False, id="main"),
        pytest.param(True, id="interpreter", marks=pytest.mark.full),  # it collects once more
    ],
)
def test_make_test_runs_what_kills_them(interpreter, request):
    """By its whole id, parameters included, in the process in which it kills: not in `make
    test-full` alone, and not under a name or a parameter that is gone, as those three are."""
    killers = {m.test for m in MUTATIONS if m.interpreter == interpreter}
    gone = {f"{HERE}test_of_test_full", f"{HERE}test_of_test", f"{min(killers)}[gone]"}
    files = {test.split("::")[0] for test in killers | gone}
    here = {item.nodeid for item in request.session.items + request.config.beside}
    if interpreter or full() or not files <= {test.split("::")[0] for test in here}:
        assert uncollected(killers | gone, interpreter) == gone
    else:  # this process has collected them
        assert (killers | gone) - here == gone


@pytest.mark.full
def test_of_test_full():
    """Not in `make test`; and tests are told that this is not `make test`."""
    assert full()


def test_names_are_unique():
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(MUTATIONS), "run: python -m tests.support.mutants --write"


def test_a_mutation_that_does_not_fit_is_named(tmp_path):
    (tmp_path / "source.py").write_text("a = 1\nb = 1\n")
    lost = Mutation("lost", "source.py", "a = 2", "a = 3", "")
    assert lost.mistake(tmp_path) == "lost: its old text occurs 0 times in source.py, not once"
    assert "occurs 2 times" in lost._replace(old="= 1").mistake(tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "other.py").write_text("a = 2\n")
    assert lost.mistake(tmp_path).endswith("not once; once in kernels/other.py")
    assert "occurs 0 times in gone.py" in lost._replace(file="gone.py").mistake(tmp_path)
    assert "changes nothing" in lost._replace(old="a = 1", new="a = 1").mistake(tmp_path)
    right = lost._replace(old="a = 1")
    assert right.mistake(tmp_path) is None
    right.apply(tmp_path)
    assert (tmp_path / "source.py").read_text() == "a = 3\nb = 1\n"


def test_only_a_failed_test_kills():
    """Exit status 2, 4 and 5 of pytest: an import that broke, an unknown test, none selected."""
    assert Outcome(TESTS_FAILED, "").killed()
    assert not any(Outcome(status, "").killed() for status in (-1, 0, 2, 3, 4, 5))
