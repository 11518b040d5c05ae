"""``curate``: reasons, batches, an event loop, what a call gets and returns, progress."""

import asyncio
import itertools
import sys
from collections import Counter

import pytest

from distill_ops.methods.system2 import REPHRASE_THEN_RESPOND, curate
from tests.support import optional
from tests.support.curations import DIRECT, Recorded, echo, facts


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


def test_a_sample_fn_that_changes_its_prompts():
    calls = []

    def sample_fn(prompts):
        calls.append(list(prompts))
        prompts[:] = [f"<user>{prompt}" for prompt in prompts]
        if len(calls) == 1:
            raise OSError("once")
        return ["the answer is a"] * len(prompts)

    (record,) = curate(["q"], DIRECT, sample_fn, n=2, retry_wait_s=0.0)
    assert record.kept
    assert calls == [["q", "q"]] * 2


@pytest.mark.parametrize("made", [set, dict.fromkeys], ids=["set", "dict"])
def test_texts_without_an_order(made):
    with pytest.raises(TypeError, match="list of texts"):
        list(curate(["q"], DIRECT, made, n=1))
