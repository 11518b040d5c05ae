"""The JSONL of ``curate``: writers that are killed, torn lines, other settings, and a constant memory."""

import asyncio
import functools
import gc
import json
import os
import random
import signal
import time

import pytest

from distill_ops.methods.system2 import (
    CHAIN_OF_THOUGHT,
    Choice,
    Method,
    Record,
    ShuffledOptions,
    Step,
    Swapped,
    curate,
    read_records,
)
from tests.support.stored_teachers import in_child, status_of

METHOD = Method("direct", (Step("text", "{question}"),))
INPUTS = [f"Frage {i} — \N{PILE OF POO}\u2028?" for i in range(60)]


def answer(prompts):
    """Of some no majority, of some nothing."""
    found = []
    for i, prompt in enumerate(prompts):
        number = int(prompt.split()[1])
        found.append(None if number % 7 == 0 else f"é {number if number % 5 else i % 3}")
    return found


def run(path, inputs=INPUTS, sample_fn=answer, **how):
    return curate(inputs, METHOD, sample_fn, **({"n": 3, "batch_size": 12, "path": path} | how))


def slow(prompts):
    time.sleep(0.002)
    return answer(prompts)


def is_running(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def test_a_killed_writer_is_resumed(tmp_path):
    whole = list(run(tmp_path / "whole"))
    assert {record.reason for record in whole} == {"kept", "tie", "unparsable"}
    expected, chance = (tmp_path / "whole").read_bytes(), random.Random(0)
    path, kills = tmp_path / "records.jsonl", 0
    while kills < 6:
        path.unlink(missing_ok=True)
        wanted = 0
        while wanted < len(expected) and kills < 6:
            size = size_of(path)
            wanted = size + chance.randint(1, 1500)
            child = in_child(lambda: list(run(path, sample_fn=slow)))
            while is_running(child) and size_of(path) < wanted:
                time.sleep(2e-4)
            os.kill(child, signal.SIGKILL)
            killed = status_of(child) == -signal.SIGKILL
            kills += killed
            found = path.read_bytes()
            assert expected.startswith(found)
            assert len(found) >= size
            assert killed or found == expected
    asked = []
    resumed = run(path, sample_fn=lambda prompts: asked.extend(prompts) or answer(prompts))
    n_there = path.read_bytes().count(b"\n")
    assert list(resumed) == whole
    assert path.read_bytes() == expected
    assert set(asked) == set(INPUTS[n_there:])
    assert resumed.summary.n == len(INPUTS)
    assert sorted(os.listdir(tmp_path)) == ["records.jsonl", "whole"]


def test_a_torn_last_line_is_made_again(tmp_path):
    path = tmp_path / "records.jsonl"
    whole = list(run(path, INPUTS[:3]))
    expected = path.read_bytes()
    last = expected[:-1].rindex(b"\n") + 1
    for cut in [0, 1, *range(last - 1, len(expected), 17), len(expected) - 1]:
        path.write_bytes(expected[:cut])
        assert list(read_records(path)) == whole[: expected[:cut].count(b"\n")]
        assert list(run(path, INPUTS[:3])) == whole
        assert path.read_bytes() == expected
    assert list(run(path, INPUTS[:3], sample_fn=lambda prompts: 1 / 0)) == whole


def test_a_long_torn_line_is_cut_off(tmp_path):
    path = tmp_path / "records.jsonl"
    whole = list(run(path, INPUTS[:2]))
    expected = path.read_bytes()
    path.write_bytes(expected + b"x" * 200_000)
    assert list(run(path, INPUTS[:2])) == whole
    assert path.read_bytes() == expected


def test_more_inputs_are_appended(tmp_path):
    list(run(tmp_path / "whole"))
    list(run(tmp_path / "records", INPUTS[:20]))
    curation = run(tmp_path / "records")
    assert len(list(curation)) == 60
    assert (tmp_path / "records").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_record_is_on_file_when_it_is_given(tmp_path):
    curation = run(tmp_path / "records")
    for i in range(5):
        record = next(curation)
        assert list(read_records(tmp_path / "records"))[i] == record
    curation.close()


def test_an_iterator_that_is_left_has_written_what_it_gave(tmp_path):
    curation = run(tmp_path / "records")
    first = [next(curation) for _ in range(5)]
    with pytest.raises(BlockingIOError, match="another writer is at work"):
        next(run(tmp_path / "records"))
    curation.close()
    assert list(read_records(tmp_path / "records"))[:5] == first
    assert len(list(run(tmp_path / "records"))) == 60


def test_an_iterator_that_is_dropped_frees_its_file_at_once(tmp_path):
    gc.disable()
    try:
        for _ in range(3):
            assert next(run(tmp_path / "records")).index == 0
    finally:
        gc.enable()


def test_an_async_iterator_that_is_left_is_closed(tmp_path):
    async def inside():
        curation = run(tmp_path / "records")
        first = await anext(curation)
        await curation.aclose()
        return [first, *[record async for record in run(tmp_path / "records")][1:]]

    assert asyncio.run(inside()) == list(run(tmp_path / "records"))


def test_an_async_iterator_is_closed_by_close(tmp_path):
    async def inside():
        curation = run(tmp_path / "records")
        async for _ in curation:
            break
        curation.close()
        return [record async for record in run(tmp_path / "records")]

    assert asyncio.run(inside()) == list(run(tmp_path / "records"))


class Repeated:
    """A perturbation that is no dataclass."""

    def __init__(self, times):
        self.times = times

    def __call__(self, fields):
        return {"question": fields["question"] * self.times}, None


def test_an_object_of_other_contents_is_another_setting(tmp_path):
    how = {"path": tmp_path / "records", "n": 1}
    asked = lambda times: curate(
        ["x"], METHOD, lambda ps: ps, perturbations=[Repeated(times)], **how
    )
    assert list(asked(2)) == list(asked(2))
    with pytest.raises(ValueError, match="other settings"):
        list(asked(3))


OTHERS = {
    "n": {"n": 4},
    "agreement": {"min_agreement": 0.6},
    "normalize": {"normalize": str.lower},
    "settings": {"settings": {"model": "B", "temperature": 0.7}},
    "method": {"method": CHAIN_OF_THOUGHT},
    "parser": {"method": METHOD.parsed_by(Choice("AB"))},
    "prompt": {"method": Method("direct", (Step("text", "{question} "),))},
    "perturbation": {"perturbations": [Swapped("question", "question")]},
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_other_settings_are_refused(tmp_path, change):
    path = tmp_path / "records.jsonl"
    method, how = METHOD, {"path": path, "settings": {"model": "A", "temperature": 0.7}, "n": 3}
    list(curate(INPUTS[:2], method, answer, **how))
    before, how = path.read_bytes(), how | change
    method = how.pop("method", method)
    with pytest.raises(ValueError, match="path .*was written with other settings .method, n, pert"):
        list(curate(INPUTS[:3], method, answer, **how))
    assert path.read_bytes() == before


def test_settings_are_the_same_in_every_process_and_order(tmp_path):
    path = tmp_path / "records.jsonl"
    how = {"path": path, "n": 2, "perturbations": [ShuffledOptions(seed=3)]}
    asked = [{"question": "?", "options": ["x", "y"]}]
    parse = functools.partial(max, default=None, key=str.lower)
    method = METHOD.parsed_by(parse)
    child = in_child(
        lambda: list(curate(asked, method, answer_a, settings={"a": 1, "b": [2.5]}, **how))
    )
    assert status_of(child) == 0
    asked = [dict(reversed(asked[0].items()))]
    again = METHOD.parsed_by(functools.partial(max, default=None, key=str.lower))
    forbidden = lambda prompts: 1 / 0
    found = curate(asked, again, forbidden, settings={"b": [2.5], "a": 1}, **how)
    assert len(list(found)) == 1
    how["perturbations"] = [ShuffledOptions(seed=4)]
    with pytest.raises(ValueError, match="other settings"):
        list(curate(asked, again, forbidden, settings={"b": [2.5], "a": 1}, **how))


def answer_a(prompts):
    return ["a"] * len(prompts)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (INPUTS[1:4], "has another input at index 0: 'Frage 0.*inputs has 'Frage 1"),
        (INPUTS[:2], "has records beyond the 2 inputs"),
    ],
)
def test_other_inputs_are_refused(tmp_path, inputs, words):
    path = tmp_path / "records.jsonl"
    list(run(path, INPUTS[:3]))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=words):
        list(run(path, inputs))
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", [b'{"question": "?"}\n', b"[1]\n", b"\xff\n", b'{"index": 0\n'])
def test_a_file_of_something_else_is_left_alone(tmp_path, text):
    path = tmp_path / "precious.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="precious.json' is no file of curate: it begins with b"):
        list(run(path))
    assert path.read_bytes() == text


def test_inputs_in_another_order_are_refused(tmp_path):
    list(run(tmp_path / "records", INPUTS[:3]))
    with pytest.raises(ValueError, match="has another input at index 1"):
        list(run(tmp_path / "records", [INPUTS[0], INPUTS[2], INPUTS[1]]))


def test_a_file_without_an_end_of_a_line_is_left_alone(tmp_path):
    test_a_file_of_something_else_is_left_alone(tmp_path, b'[{"question": "?"}]')


def test_a_line_that_was_changed_is_named(tmp_path):
    path = tmp_path / "records.jsonl"
    list(run(path, INPUTS[:3]))
    lines = path.read_bytes().splitlines(keepends=True)
    for wrong in (b"\n", b"{}\n", b'{"index": 1, "key": "a-b"}\n', b"[1]\n", b"\xff\n"):
        path.write_bytes(b"".join([lines[0], wrong, lines[2]]))
        with pytest.raises(ValueError, match="records.jsonl, line 2, is no record of curate"):
            list(run(path))
        with pytest.raises(ValueError, match="line 2, is no record"):
            list(read_records(path))
    path.write_bytes(b"".join([lines[0], lines[2]]))
    with pytest.raises(ValueError, match="has another input at index 1"):
        list(run(path))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(run(tmp_path / "nowhere" / "records.jsonl"))


def test_the_lines_are_of_one_schema(tmp_path):
    """So that ``datasets.load_dataset("json", data_files=...)`` infers one type a column."""
    path = tmp_path / "records.jsonl"
    fails = lambda prompts: (
        1 / 0 if any("Frage 3" in prompt for prompt in prompts) else answer(prompts)
    )
    records = list(run(path, INPUTS[:9], sample_fn=fails, retries=0))
    assert {"kept", "failed", "tie", "unparsable"} == {record.reason for record in records}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    names = ["index", "key", *Record._fields[1:]]
    types = {
        "index": int,
        "key": str,
        "input": str,
        "agreement": float,
        "kept": bool,
        "reason": str,
        "detail": str,
    }
    for row, record in zip(rows, records, strict=True):
        assert list(row) == names
        assert all(type(row[name]) is kind for name, kind in types.items())
        assert row["target"] is None or type(row["target"]) is str
        assert Record(**{name: row[name] for name in Record._fields}) == record


def test_half_of_a_surrogate_pair_is_written(tmp_path):
    path = tmp_path / "records.jsonl"
    asked = [{"question": "broken \ud83d"}, "whole \N{GRINNING FACE}"]
    records = list(curate(asked, METHOD, lambda ps: ps, n=2, path=path))
    assert list(read_records(path)) == records
    assert list(curate(asked, METHOD, lambda ps: 1 / 0, n=2, path=path)) == records
    path.read_text(encoding="utf-8")


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
def test_memory_is_constant(tmp_path):
    n_records = 100_000
    asked = ("question " + str(i).zfill(500) for i in range(n_records))
    how = {"n": 1, "batch_size": 1024, "path": tmp_path / "records.jsonl"}
    curation = curate(asked, METHOD, lambda prompts: [prompt[-1] for prompt in prompts], **how)
    for record in curation:
        if record.index == n_records // 10:
            before = resident_bytes()
    # a tenth of what the remaining inputs alone would take
    assert resident_bytes() - before < 0.1 * 0.9 * 500 * n_records
    assert curation.summary.reasons == {"kept": n_records}
