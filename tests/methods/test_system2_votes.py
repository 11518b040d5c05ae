"""Answers, votes and perturbations of ``methods.system2``: what is parsed, what agrees, what is undone."""

import itertools
import unicodedata

import pytest

from distill_ops.methods import system2
from distill_ops.methods.system2 import (
    Choice,
    ShuffledOptions,
    Swapped,
    final_answer,
    last_number,
    listed,
    majority_vote,
    normalize_answer,
    perturbation_consistent,
)

FINAL = {
    "The answer is 42.": "42",
    "the ANSWER IS: **Paris**.": "Paris",
    "Answer: (B)": "(B)",
    "**Answer:** no": "no",
    "Answer:\n\n  ey \n": "ey",
    "So it is\n\n 'ey'.": "ey",
    r"We get \boxed{12}. Check. \boxed{13}": "13",
    "The answer is 1.5.": "1.5",
    "Réponse : 大阪": "Réponse : 大阪",
    "The answer is": None,
    " \n\t": None,
    "": None,
    "...": "..",  # which a vote finds empty
}


@pytest.mark.parametrize(("text", "expected"), FINAL.items())
def test_final_answer(text, expected):
    assert final_answer(text) == expected


def test_the_last_stated_answer():
    assert final_answer("The answer is 3. No: the answer is 4.\nI am sure.") == "4"


NUMBERS = {
    "12": "12", "-3.50 degrees": "-3.5", "+7": "7", "\u22128": "-8", "1,234,567.0": "1234567", "x is 0.0": "0",
    "$1,200": "1200", "15% of 80 is 12": "12", "007": "7", "-0.0": "0", "5kg": "5", "25%": "25", "= **12** eggs": "12",
    "4.": "4", "(9)": "9", "100": "100", "2+2=4": "4", "**Answer:** 12": "12", "$-5": "-5", "12 cm²": "12", "(-2)": "-2",
    r"\boxed{-7}": "-7", r"\boxed{12\%}": "12", r"$\approx 5$": "5", r"\(5\text{ cm}\)": "5", r"90^\circ": "90", "12!": "12",
    "1. 3\n2. -4": "-4", "5\n-4": "-4", "100 200\n300": "300", "60 miles/hour": "60",
}  # fmt: skip
PARTS_OF_MORE = [
    "1/2", "1 / 2", "1e5", "3.5e-2", "v2", "12,34", ".5", "1.2.3", "no", "3-4", "2024-01-05", "3–4", "1 000", "1\u202f000", "1, 000",
    "2 000.50", "1'000", "1’000", "1_000", "1，000", "0x1F", "0b101", "25 cm^2", "x^{2}", "10^-2", "10^(3)", "2^n", "5 x 10^3",
    "5 × 10³", "5 x 10", "2 x $9", "5*10", "5 * 10", "2**3", "3 + 4", "3 -4", "= - 2", "-$5", "- 2 apples", r"5 \times 10", r"2\pi", "√2",
    r"\frac{1}{2}", r"\sqrt{2}", "f(2)", "2(x + 1)", "2x", "2*x", "2 * x", "3 + x", "1/x", "10k", "5 k", "$5m", "3 million", "5-thousand",
    "2 dozen", "3 quarters", "2 and a half", "2½", "2 ½", "2nd", "1990s", "2:30", "3 : 4", "5 ± 1", "12 or 13", "5 to 6", "|-5|",
]  # fmt: skip
NUMBERS |= dict.fromkeys(PARTS_OF_MORE)


@pytest.mark.parametrize(("text", "expected"), NUMBERS.items())
def test_last_number(text, expected):
    assert last_number(text) == expected


def test_choice_is_one_letter_or_none():
    parse = Choice("ABCD")
    found = ["Answer: B", "The answer is (C).", "A cat.\nThe answer is D, surely", "B"]
    assert [parse(text) for text in found] == ["B", "C", "D", "B"]
    unsure = ["The answer is A or B.", "The answer is E.", "BAD", "the answer is a", ""]
    assert [parse(text) for text in unsure] == [None] * 5
    words = [
        "It is close.\nA better one is B-like",
        "A good answer",
        "I think so.",
        "I prefer it",
        "I",
    ]
    assert [Choice("ABI")(text) for text in words] == [None, None, None, None, "I"]
    letters = [
        "A is better",
        "Option A looks right",
        "(A) cat",
        "A: a cat",
        "A, as I said",
        "I think B",
    ]
    assert [parse(text) for text in letters] == [*"AAAAAB"]
    with pytest.raises(ValueError, match=r"letters must be a string of letters, got 'A\]B'"):
        Choice("A]B")


def test_listed():
    assert listed("Plan:\n 1. one\n2) *two*\n- three\n\n* four") == ["one", "two", "three", "four"]
    assert listed("one\n\n two ") == ["one", "two"]
    assert listed(" \n") == []


def test_normalized_answers():
    same = ["New York", " new  york. ", "**NEW\tYORK**", "“New York”", "new\u00a0york"]
    assert {normalize_answer(text) for text in same} == {"new york"}
    composed, apart = "Malmö", unicodedata.normalize("NFD", "MALMÖ")
    assert composed != apart
    assert normalize_answer(composed) == normalize_answer(apart)
    # what only looks or sounds alike stays two answers
    for one, other in [("x²", "x2"), ("Maße", "Masse"), ("1.5", "15"), ("-3", "3"), ("b)", "b")]:
        assert normalize_answer(one) != normalize_answer(other)


VOTES = [
    ([], None, 0.0, "no answers"),
    (["", " ", None, "..."], None, 0.0, "unparsable"),
    (["4"], "4", 1.0, "agreed"),
    (["4", "4", "5"], "4", 2 / 3, "agreed"),
    (["4", "4", "5", "5", "6"], None, 0.4, "tie"),
    (["4", "4", "5", None], "4", 0.5, "agreed"),
    (["4", "4", "5", "6", "7"], None, 0.4, "low agreement"),
    (["ÅR", "år", unicodedata.normalize("NFD", "år")], None, 1.0, "agreed"),
    (["大阪", "大阪。", "大阪"], "大阪", 2 / 3, "agreed"),
    (["Paris", "paris", "Paris", "Rome"], "Paris", 0.75, "agreed"),
    (["B.", "B"], "B", 1.0, "agreed"),  # the first in the alphabet
]


@pytest.mark.parametrize(("answers", "answer", "agreement", "reason"), VOTES)
def test_votes_whatever_the_order(answers, answer, agreement, reason):
    votes = {
        (vote.answer, vote.agreement, vote.reason, tuple(vote.counts.items()))
        for vote in map(majority_vote, itertools.islice(itertools.permutations(answers), 720))
    }
    assert len(votes) == 1
    found = votes.pop()
    assert found[1:3] == (pytest.approx(agreement), reason)
    if reason == "agreed" and answer is not None:
        assert found[0] == answer
    assert (found[0] is None) == (reason != "agreed")


def test_a_tie_is_no_answer():
    assert majority_vote(["4", "5"])[::2] == majority_vote(["5", "4"])[::2] == (None, "tie")


def test_unparsable_answers_count():
    assert majority_vote(["4", None, None])[:3] == (None, pytest.approx(1 / 3), "low agreement")


def test_the_spelling_does_not_depend_on_the_order():
    for answers in itertools.permutations(["b", "B", "b", "b."]):
        assert majority_vote(answers).answer == "b"


def test_what_a_vote_takes():
    assert majority_vote(["4", "4", "5", "6"], min_agreement=0.6).reason == "low agreement"
    assert majority_vote(["4", "5", "4", None, None], min_agreement=0).answer == "4"
    assert majority_vote(["7"] * 7 + ["1"] * 3, min_agreement=0.7).answer == "7"
    assert majority_vote(["4.0", "4"], normalize=last_number).answer == "4"
    assert majority_vote(["four", "4"], normalize=last_number)[:3] == ("4", 0.5, "agreed")
    assert majority_vote(x for x in "aab").counts == {"a": 2, "b": 1}
    with pytest.raises(
        TypeError, match="answers must be an iterable of strings or None, got a str 'yes'"
    ):
        majority_vote("yes")
    with pytest.raises(TypeError, match=r"answers\[1\] must be a str or None, got 4"):
        majority_vote(["4", 4])
    with pytest.raises(ValueError, match=r"min_agreement must be in \[0, 1\], got 50"):
        majority_vote(["4"], min_agreement=50)
    with pytest.raises(TypeError, match="normalize must return a str or None, got 4.0"):
        majority_vote(["4"], normalize=float)


SWAP = {"A": "B", "B": "A"}
CONSISTENT = [
    (["A", "B"], [None, SWAP], "A", "agreed"),
    (["A", "b."], [None, SWAP], "A", "agreed"),
    (["A", "A"], [None, SWAP], None, "inconsistent"),
    ([None, "A"], [None, SWAP], None, "unparsable"),
    (["A", "B"], [None, lambda x: {"B": "A"}[x]], "A", "agreed"),
    (["A", "B", "A"], [None, SWAP, SWAP], None, "inconsistent"),
    ([], [], None, "no answers"),
]


@pytest.mark.parametrize(("answers", "undo", "answer", "reason"), CONSISTENT)
def test_perturbations_must_agree(answers, undo, answer, reason):
    vote = perturbation_consistent(answers, undo)
    assert (vote.answer, vote.reason) == (answer, reason)
    vote = perturbation_consistent(answers[::-1], undo[::-1])
    assert (vote.answer, vote.reason) == (answer, reason)


def test_what_cannot_be_undone_is_unparsable():
    for answers in (["A", "C"], ["A", None]):
        vote = perturbation_consistent(answers, [None, SWAP])
        assert (vote.answer, vote.reason) == (None, "unparsable")


def test_what_perturbation_consistent_takes():
    most = perturbation_consistent(["A", "B", "A"], [None, SWAP, SWAP], min_agreement=0.6)
    assert most[:3] == ("A", pytest.approx(2 / 3), "agreed")
    one_missing = perturbation_consistent(["A", "B", None], [None, SWAP, SWAP], min_agreement=0.6)
    assert one_missing.answer == "A"
    with pytest.raises(
        ValueError, match="undo must have one entry for each of the 2 answers, got 1"
    ):
        perturbation_consistent(["A", "B"], [SWAP])
    with pytest.raises(TypeError, match=r"undo\[0\] must be a function, a mapping or None, got 3"):
        perturbation_consistent(["A"], [3])
    with pytest.raises(TypeError, match=r"the result of undo\[0\] must be a str or None, got 1"):
        perturbation_consistent(["A"], [len])


@pytest.mark.parametrize("n", [2, 3, 26])
def test_shuffled_options_are_undone(n):
    asked = {"question": "?", "options": [f"option {i}" for i in range(n)]}
    orders = set()
    for seed in range(5):
        other, undo = ShuffledOptions(seed=seed)(asked)
        again, _ = ShuffledOptions(seed=seed)(asked)
        assert again == other
        assert other["options"] != asked["options"]
        assert sorted(other["options"]) == sorted(asked["options"])
        for new, option in enumerate(other["options"]):
            assert undo[chr(65 + new)] == chr(65 + asked["options"].index(option))
        orders.add(tuple(other["options"]))
    assert len(orders) > (n > 2)
    assert asked["options"][0] == "option 0"


def test_perturbations_need_their_fields():
    with pytest.raises(
        ValueError, match=r"ShuffledOptions needs inputs with a field 'options', got .*'question'"
    ):
        ShuffledOptions()({"question": "?"})
    with pytest.raises(ValueError, match="needs a list of 2 to 26 options in 'options', got 'AB'"):
        ShuffledOptions()({"options": "AB"})
    with pytest.raises(ValueError, match="Swapped needs inputs with a field 'response_b'"):
        Swapped()({"response_a": "x"})
    other, undo = Swapped("left", "right", ("1", "2"))({"left": "x", "right": "y", "question": "?"})
    assert other == {"left": "y", "right": "x", "question": "?"}
    assert [undo("1"), undo("2"), undo("both")] == ["2", "1", "both"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("A", "B"), ("b", "A"), ("(A)", "(B)"), ("Response B", "Response A"), ("a tie", "a tie"), ("A or B", None)],
)  # fmt: skip
def test_swapped_exchanges_names_within_words(answer, expected):
    _, undo = system2.Swapped()({"response_a": "yes", "response_b": "no"})
    assert undo(answer) == expected


def test_a_decimal_fraction_is_no_integer():
    assert system2.normalize_answer(".5") != system2.normalize_answer("5")
    assert system2.normalize_answer("...yes.") == "yes"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"First \boxed{3}. Wait: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\text{B}}", r"\text{B}"),
        (r"\boxed{3", None),
    ],
)
def test_boxes_with_braces(text, expected):
    assert system2.final_answer(text) == expected
