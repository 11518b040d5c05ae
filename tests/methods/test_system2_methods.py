"""``curate`` with methods: their prompts, steps and parsers, perturbed inputs, a method of one's own."""

import re

import pytest

from distill_ops.methods.system2 import (
    BRANCH_SOLVE_MERGE,
    CHAIN_OF_THOUGHT,
    REPHRASE_AND_RESPOND,
    REPHRASE_THEN_RESPOND,
    SYSTEM_2_ATTENTION,
    Choice,
    Method,
    ShuffledOptions,
    Step,
    Swapped,
    curate,
    last_number,
)
from tests.support.curations import DIRECT, Recorded, echo, facts


def test_two_calls_use_the_first_ones_text():
    sampled = Recorded(lambda p: "Rephrased!" if "rephrase and expand" in p else "The answer is 2.")
    (record,) = curate(["1+1"], REPHRASE_THEN_RESPOND, sampled, n=3)
    first, second = sampled.calls
    assert (
        first
        == [
            '"1+1"\nGiven the above question, rephrase and expand it to help you do better answering. '
            "Maintain all information in the original question."
        ]
        * 3
    )
    assert (
        second
        == [
            "(original) 1+1\n(rephrased) Rephrased!\nUse your answer for the rephrased question to answer "
            "the original question."
        ]
        * 3
    )
    assert record == (0, "1+1", "2", 1.0, True, "kept", "3 x 2")


def test_each_method_asks_as_it_says():
    asked = {"question": "Who? {x}", "response_a": "me", "response_b": "you"}
    for method in (REPHRASE_AND_RESPOND, SYSTEM_2_ATTENTION, CHAIN_OF_THOUGHT):
        sampled = Recorded(lambda prompt: "So the answer is Ann.")
        (record,) = curate([asked], method, sampled, n=2)
        assert [len(call) for call in sampled.calls] == [2] * method.calls
        assert "Who? {x}" in sampled.calls[0][0]
        assert record.target == "Ann"
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", method.source)
    assert "Rephrase and expand the question, and respond." in REPHRASE_AND_RESPOND.steps[0].prompt


def test_branch_solve_merge():
    def answer(prompt):
        if "List up to five aspects" in prompt:
            return "1. truth\n2. tone\n" + "".join(f"{i}. more\n" for i in range(3, 9))
        if "one aspect alone" in prompt:
            return f"Judged: {re.search('alone: (.*)', prompt)[1]}."
        assert "1. Judged: truth.\n\n2. Judged: tone.\n\n3. Judged: more." in prompt
        return "The answer is A."

    sampled = Recorded(answer)
    asked = {"question": "Who?", "response_a": "me", "response_b": "you"}
    (record,) = curate([asked], BRANCH_SOLVE_MERGE, sampled, n=2)
    assert [len(call) for call in sampled.calls] == [2, 10, 2]
    assert record.target == "A"
    nothing = Recorded(lambda prompt: " \n")
    (record,) = curate([asked], BRANCH_SOLVE_MERGE, nothing, n=2)
    assert (record.reason, len(nothing.calls)) == ("unparsable", 1)


def test_a_judge_that_prefers_the_first_is_found_out():
    asked = {"question": "Who?", "response_a": "wrong", "response_b": "right"}
    judge = Method(
        "judge", (Step("verdict", "{question} {response_a}/{response_b}"),), parse=Choice("AB")
    )
    knows = lambda ps: [f"The answer is {'A' if 'right/' in p else 'B'}" for p in ps]
    for fn, expected in [
        (knows, ("B", "kept")),
        (lambda ps: ["A"] * len(ps), (None, "inconsistent")),
    ]:
        (record,) = curate([asked], judge, fn, n=2, perturbations=[Swapped()])
        assert (record.target, record.reason) == expected
    assert record.detail == "2 x a | 2 x a"


def test_options_are_shuffled_and_undone():
    asked = [
        {"question": f"{i} + 1?", "options": [str(i), str(i + 1), str(i + 2)]} for i in range(9)
    ]
    method = Method("choose", (Step("text", "{question}\n{options}"),), parse=Choice("ABC"))

    def knows(prompts):
        found = []
        for prompt in prompts:
            right = int(prompt.split()[0]) + 1
            found.append(re.search(rf"\(([ABC])\) {right}$", prompt, re.MULTILINE)[1])
        return found

    shuffles = [ShuffledOptions(seed=seed) for seed in range(2)]
    records = list(curate(asked, method, knows, n=2, perturbations=shuffles, batch_size=7))
    assert {(record.target, record.agreement) for record in records} == {("B", 1.0)}
    first = curate(asked, method, lambda ps: ["A"] * len(ps), n=2, perturbations=shuffles)
    assert {record.reason for record in first} == {"inconsistent"}


def test_agreement_is_of_samples_or_of_versions():
    """Its mean over versions where they have one answer, else the share of versions that have one."""
    asked = {"question": "Who?", "response_a": "me", "response_b": "you"}
    method = Method(
        "judge", (Step("text", "{response_a}/{response_b} {question}"),), parse=Choice("AB")
    )
    again = lambda fields: ({**fields, "question": "Who, again?"}, None)

    def agreed(swapped, other):
        texts = {"me/you Who?": "AAAB", "you/me Who?": swapped, "me/you Who, again?": other}
        count = dict.fromkeys(texts, 0)

        def sample_fn(prompts):
            found = []
            for prompt in prompts:
                found.append(texts[prompt][count[prompt]])
                count[prompt] += 1
            return found

        (record,) = curate([asked], method, sample_fn, n=4, perturbations=[Swapped(), again])
        return record.target, record.reason, record.agreement

    assert agreed("BBBB", "AAAA") == ("A", "kept", pytest.approx((0.75 + 1 + 1) / 3))
    assert agreed("BBBB", "BBBB") == (None, "inconsistent", pytest.approx(2 / 3))
    assert agreed("BBAA", "AAAA") == (None, "inconsistent", pytest.approx(2 / 3))


class Thrown(Exception):
    pass


def throw(*_):
    raise Thrown("oh")


SURE = Method("sure", DIRECT.steps, parse=str)
RAISING = {
    "method 'direct'": (DIRECT.parsed_by(throw), {}),
    "perturbations[1]": (SURE, {"perturbations": [Swapped("question", "question"), throw]}),
    "undo of perturbations, or normalize,": (SURE, {"perturbations": [lambda x: (x, throw)]}),
    "normalize": (SURE, {"normalize": throw}),
}


@pytest.mark.parametrize(("who", "how"), RAISING.items())
def test_an_error_of_a_users_function_names_the_input(who, how):
    method, how = how
    words = re.escape(f"{who} raised at input 0, 'Frage': Thrown: oh")
    with pytest.raises(RuntimeError, match=words) as caught:
        list(curate(["Frage"], method, echo, n=2, **how))
    assert isinstance(caught.value.__cause__, Thrown)
    parse = {"The answer is a": "a"}.__getitem__
    with pytest.raises(RuntimeError, match="'direct' raised at input 1, 'b': KeyError"):
        list(curate(["a", "b"], DIRECT.parsed_by(parse), echo, n=1))
    with pytest.raises(
        ValueError, match=r"perturbations\[0\] raised at input 0, 'a': .*needs inputs"
    ):
        list(curate(["a"], DIRECT, echo, perturbations=[Swapped()]))


def test_a_method_of_ones_own():
    asked = []

    class UntilSure(Method):
        def program(self, fields):
            for text in ("", "Think. ", "Think more. "):
                (found,) = yield [text + fields["question"]]
                if found.startswith("sure"):
                    return found.removeprefix("sure ")
            return None

    def sample_fn(prompts):
        asked.append(list(prompts))
        return ["sure 4" if p.startswith("Think.") and "2" in p else "?" for p in prompts]

    method = UntilSure("until sure", DIRECT.steps)
    assert facts(curate(["2", "3"], method, sample_fn, n=1)) == [
        (0, "4", "kept"),
        (1, None, "unparsable"),
    ]
    assert asked == [["2", "3"], ["Think. 2", "Think. 3"], ["Think more. 3"]]


def test_braces_of_the_text():
    step = Step("a", r"\frac{{1}}{{2}} of {question}")
    assert step.names == {"question"}
    sampled = Recorded(lambda prompt: "2")
    (record,) = curate(["{x}"], Method("m", (step,), parse=last_number), sampled, n=1)
    assert sampled.calls == [[r"\frac{1}{2} of {x}"]]
    assert record.detail == "1 x 2"


@pytest.mark.parametrize("wrong", ["a text", None, [1]])
def test_a_program_that_yields_no_list_of_prompts(wrong):
    class Wrong(Method):
        def program(self, fields):
            texts = yield wrong
            return texts[0]

    with pytest.raises(
        TypeError, match="'x' must yield a list of prompts, got .*at input 0, 'hello'"
    ):
        list(curate(["hello"], Wrong("x", DIRECT.steps), lambda prompts: prompts, n=1))
