"""``curate``: methods of several calls, batches, failures and an event loop."""

import asyncio
import itertools
import re
import sys
from collections import Counter

import pytest

from distill_ops.methods import system2
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
from tests.support import optional

DIRECT = Method("direct", (Step("text", "{question}"),))


def echo(prompts):
    return [f"The answer is {prompt}" for prompt in prompts]


def facts(records):
    return [(record.index, record.target, record.reason) for record in records]


class Recorded:
    """A ``sample_fn`` that remembers what it was asked."""

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def __call__(self, prompts):
        self.calls.append(list(prompts))
        return [self.answer(prompt) for prompt in prompts]


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


def test_reasons_and_their_summary():
    texts = {"a": "1112", "b": "1122", "c": "1234", "d": "xxxx", "e": "11xx", "f": "111x"}
    count = Counter()

    def sample_fn(prompts):
        found = []
        for prompt in prompts:
            found.append(texts[prompt][count[prompt]])
            count[prompt] += 1
        return [None if text == "x" else text for text in found]

    curation = curate(list(texts), DIRECT, sample_fn, n=4, min_agreement=0.6)
    records = list(curation)
    reasons = ["kept", "tie", "tie", "unparsable", "low agreement", "kept"]
    assert [record.reason for record in records] == reasons
    assert [record.kept for record in records] == [r == "kept" for r in reasons]
    assert [record.agreement for record in records] == [0.75, 0.5, 0.25, 0.0, 0.5, 0.75]
    assert curation.summary.reasons == Counter(reasons)
    assert (curation.summary.share, curation.summary.n_texts) == (1 / 3, 24)
    assert "low agreement       1  16.7%" in str(curation.summary)
    assert list(curation) == []  # once


def test_calls_are_shared_by_inputs_and_bounded():
    sampled = Recorded(lambda prompt: "1")
    asked = (str(i) for i in range(10))
    assert len(list(curate(asked, REPHRASE_THEN_RESPOND, sampled, n=3, batch_size=12))) == 10
    assert [len(call) for call in sampled.calls] == [12, 12, 12, 12, 6, 6]
    sampled.calls.clear()
    list(curate(["0"], DIRECT, sampled, n=5, batch_size=2))  # an input alone is more than a call
    assert [len(call) for call in sampled.calls] == [2, 2, 1]


def test_inputs_are_read_as_they_are_needed():
    read = []
    asked = (read.append(i) or str(i) for i in itertools.count())
    curation = curate(asked, DIRECT, echo, n=1, batch_size=4)
    assert read == []
    assert facts(itertools.islice(curation, 5))[-1] == (4, "4", "kept")
    assert read == list(range(8))
    curation.close()


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


class Flaky:
    def __init__(self, fails):
        self.fails, self.n_calls = fails, 0

    def __call__(self, prompts):
        self.n_calls += 1
        if self.fails(self.n_calls, prompts):
            raise ConnectionError("gone")
        return echo(prompts)


def test_a_call_that_fails_once_is_made_again():
    flaky = Flaky(lambda call, prompts: call % 2 == 1)
    records = list(curate(map(str, range(6)), DIRECT, flaky, n=1, batch_size=2, retry_wait_s=0.001))
    assert facts(records) == [(i, str(i), "kept") for i in range(6)]
    assert flaky.n_calls == 6


def test_retries_wait_longer_each_time(monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    list(curate(["1"], DIRECT, Flaky(lambda call, prompts: call < 4), retries=3, retry_wait_s=0.5))
    assert waits == [0.5, 1.0, 2.0]


def test_an_input_that_fails_is_a_reason_and_the_others_are_kept(tmp_path):
    flaky = Flaky(lambda call, prompts: "3" in prompts)
    path = tmp_path / "records.jsonl"
    curation = curate(
        map(str, range(6)), DIRECT, flaky, n=2, batch_size=6, path=path, retry_wait_s=0
    )
    records = list(curation)
    expected = [(i, str(i), "kept") for i in range(6)]
    expected[3] = (3, None, "failed")
    assert facts(records) == expected
    assert records[3].detail == "ConnectionError: gone"
    assert curation.summary.reasons == {"kept": 5, "failed": 1}
    # the window of inputs 3 to 5: three tries, then each alone
    assert flaky.n_calls == 1 + 3 + 3
    assert facts(curate(map(str, range(6)), DIRECT, flaky, n=2, path=path)) == expected


def test_all_inputs_fail():
    asked = ["1", "2", "3"]
    records = list(curate(asked, DIRECT, Flaky(lambda *_: True), retries=0))
    assert facts(records) == [(i, None, "failed") for i in range(3)]


@pytest.mark.parametrize("batch_size", [2, 64])
def test_a_server_that_is_gone_stops_the_run_and_loses_nothing(tmp_path, batch_size):
    path, asked = tmp_path / "records.jsonl", [str(i) for i in range(40)]
    how = {"n": 2, "path": path, "batch_size": batch_size}
    gone = Flaky(lambda call, prompts: any(int(prompt) >= 33 for prompt in prompts))
    with pytest.raises(
        RuntimeError, match=r"4 inputs in a row \(max_failures\).*input 36: Conn.*gone"
    ):
        list(curate(asked, DIRECT, gone, max_failures=4, retries=0, **how))
    n_written = path.read_bytes().count(b"\n")
    assert n_written == (33 if batch_size == 2 else 32)
    assert facts(curate(asked, DIRECT, echo, **how)) == [(i, str(i), "kept") for i in range(40)]


async def slow(prompts):
    await asyncio.sleep(0)
    return echo(prompts)


class AsyncClient:
    """As HTTP clients do, it belongs to the loop in which it was first used."""

    loop = None

    async def __call__(self, prompts):
        assert self.loop in (None, asyncio.get_running_loop())
        self.loop = asyncio.get_running_loop()
        return await slow(prompts)


@pytest.mark.parametrize("sample_fn", [echo, slow, AsyncClient()], ids=["sync", "async", "object"])
def test_with_and_without_an_event_loop(sample_fn):
    expected = [(i, str(i), "kept") for i in range(5)]
    how = {"n": 2, "batch_size": 4}
    if not isinstance(sample_fn, AsyncClient):
        assert facts(curate(map(str, range(5)), DIRECT, sample_fn, **how)) == expected

    async def inside():
        curation = curate(map(str, range(5)), DIRECT, sample_fn, **how)
        found = [record async for record in curation]
        assert curation.summary.n == 5
        return found

    assert facts(asyncio.run(inside())) == expected
    if isinstance(sample_fn, AsyncClient):
        sample_fn.loop = None
        assert facts(curate(map(str, range(5)), DIRECT, sample_fn, **how)) == expected


def test_for_inside_of_an_event_loop_says_what_to_write():
    async def inside():
        return list(curate(["1"], DIRECT, slow, retries=5))

    with pytest.raises(RuntimeError, match="iterate with `async for record in curate"):
        asyncio.run(inside())


def test_async_failures_are_retried_too():
    calls = []

    async def flaky(prompts):
        calls.append(len(prompts))
        if len(calls) == 1:
            raise TimeoutError
        return echo(prompts)

    async def inside():
        return [x async for x in curate(["1"], DIRECT, flaky, n=2, retry_wait_s=0.001)]

    assert facts(asyncio.run(inside())) == [(0, "1", "kept")]
    assert calls == [2, 2]


def test_an_error_of_the_parser_names_the_input():
    method = DIRECT.parsed_by(lambda text: {"The answer is 0": "0"}[text])
    with pytest.raises(
        RuntimeError, match=r"method 'direct' raised at input 1: KeyError"
    ) as caught:
        list(curate(["0", "1"], method, echo, n=2))
    assert isinstance(caught.value.__cause__, KeyError)


def test_progress(capsys):
    optional("rich")
    list(curate(["1", "2"], DIRECT, echo, n=1, progress=True))
    shown = capsys.readouterr().err
    assert "2 inputs, 100.0% kept" in shown
    assert "mean agreement of the kept: 1.000; texts sampled: 2" in shown


def test_progress_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ImportError, match="progress=True needs rich: pip install rich"):
        curate(["1"], DIRECT, echo, progress=True)


def test_braces_of_the_text():
    step = Step("a", r"\frac{{1}}{{2}} of {question}")
    assert step.names == {"question"}
    sampled = Recorded(lambda prompt: "2")
    (record,) = curate(["{x}"], Method("m", (step,), parse=last_number), sampled, n=1)
    assert sampled.calls == [[r"\frac{1}{2} of {x}"]]
    assert record.detail == "1 x 2"


def test_a_sample_fn_that_changes_its_prompts():
    calls = []

    def sample_fn(prompts):
        calls.append(list(prompts))
        prompts[:] = [f"<user>{prompt}" for prompt in prompts]
        if len(calls) == 1:
            raise OSError("once")
        return ["the answer is a"] * len(prompts)

    method = system2.Method("direct", (system2.Step("text", "{question}"),))
    (record,) = system2.curate(["q"], method, sample_fn, n=2, retry_wait_s=0.0)
    assert record.kept
    assert calls == [["q", "q"]] * 2


@pytest.mark.parametrize("made", [set, dict.fromkeys], ids=["set", "dict"])
def test_texts_without_an_order(made):
    method = system2.Method("direct", (system2.Step("text", "{question}"),))
    with pytest.raises(TypeError, match="list of texts"):
        list(system2.curate(["q"], method, made, n=1))


def test_a_program_that_yields_a_text_in_place_of_prompts():
    class Letters(system2.Method):
        def program(self, fields):
            texts = yield fields["question"]
            return texts[0]

    method = Letters("letters", (system2.Step("text", "{question}"),))
    with pytest.raises(TypeError, match="'letters' must yield a list of prompts, got .*at input 0"):
        list(system2.curate(["hello"], method, lambda prompts: prompts, n=1))
