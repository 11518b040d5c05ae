"""``curate`` where calls fail: retries, reasons, servers that are gone, and what is asked again."""

import asyncio
import os
import signal

import pytest

from distill_ops.methods.system2 import Method, curate, read_records
from tests.support.curations import DIRECT, TWO_STEPS, Flaky, echo, facts
from tests.support.stored_teachers import in_child, status_of


def test_a_call_that_fails_once_is_made_again():
    flaky = Flaky(lambda call, prompts: call % 2 == 1)
    records = list(curate(map(str, range(6)), DIRECT, flaky, n=1, batch_size=2, retry_wait_s=0.001))
    assert facts(records) == [(i, str(i), "kept") for i in range(6)]
    assert len(flaky.calls) == 6


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
    assert len(flaky.calls) == 1 + 3 + 3
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
    curation, found = curate(asked, DIRECT, gone, max_failures=4, retries=0, **how), []
    with pytest.raises(
        RuntimeError, match=r"4 inputs in a row \(max_failures\).*input 36: Conn.*gone"
    ) as caught:
        found += curation
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert facts(read_records(path)) == [(i, str(i), "kept") for i in range(33)]
    assert facts(curate(asked, DIRECT, echo, **how)) == [(i, str(i), "kept") for i in range(40)]


def stopped(curation):
    """What an iterator gives before it ends with too many failures."""
    found = []
    with pytest.raises(RuntimeError, match="in a row"):
        found.extend(curation)
    return facts(found)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_failures_with_others_between_them_are_not_in_a_row(batch_size):
    odd = Flaky(lambda call, prompts: any(int(prompt) % 3 for prompt in prompts))
    how = {"n": 1, "retries": 0, "batch_size": batch_size}
    records = list(curate(map(str, range(12)), DIRECT, odd, max_failures=3, **how))
    assert [record.kept for record in records] == [True, False, False] * 4
    assert stopped(curate(map(str, range(12)), DIRECT, odd, max_failures=2, **how)) == [
        (0, "0", "kept")
    ]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_second_step_that_is_gone_stops_the_run(tmp_path, batch_size):
    path = tmp_path / "records.jsonl"
    gone = Flaky(lambda call, prompts: prompts[0].startswith("2:"))
    how = {"n": 1, "retries": 0, "batch_size": batch_size, "path": path}
    assert stopped(curate(map(str, range(40)), TWO_STEPS, gone, max_failures=6, **how)) == []
    assert path.read_bytes() == b""
    assert sum(call[0].startswith("2:") for call in gone.calls) <= 6 + 2


def test_what_is_done_is_yielded_before_the_run_stops():
    of = lambda step, first: Flaky(
        lambda call, prompts: any(
            prompt.startswith("2:") == (step == 2) and int(prompt[-1]) >= first
            for prompt in prompts
        )
    )
    how = {"n": 2, "retries": 0, "batch_size": 16, "max_failures": 3}
    asked = [str(i) for i in range(8)]
    done = [(i, f"2: {i}", "kept") for i in range(3)]
    assert stopped(curate(asked, TWO_STEPS, of(2, 3), **how)) == done
    assert (
        stopped(curate(asked, TWO_STEPS, of(1, 3), **how)) == []
    )  # of which no second call is made


def test_no_more_is_asked_for_an_input_that_failed():
    flaky = Flaky(lambda call, prompts: "0" in prompts)
    list(curate(["0", "1"], DIRECT, flaky, n=6, batch_size=2, retries=0))
    assert flaky.calls == [["0"] * 2, *[["1"] * 2] * 3]

    class Three(Method):
        def program(self, fields):
            yield ["1"]
            (second,) = yield ["2: " + fields["question"]]
            (third,) = yield ["3: " + second.split()[-1]]  # there is one, as it did not fail
            return third.removeprefix("The answer is ")

    method = Three("three", DIRECT.steps)
    flaky = Flaky(lambda call, prompts: "2: 0" in prompts)
    records = list(curate(["0", "1"], method, flaky, n=1, retries=0))
    assert flaky.calls[-1] == ["3: 1"]
    assert facts(records) == [(0, None, "failed"), (1, "3: 1", "kept")]


ASKED = [str(i) for i in range(9)]


def of_failures(path, fails="2457"):
    """The bytes of a file in which some inputs failed, and of one in which none did."""
    how = {"n": 2, "batch_size": 4, "retries": 0}
    flaky = Flaky(lambda call, prompts: bool(set(prompts) & set(fails)))
    list(curate(ASKED, DIRECT, flaky, path=path, **how))
    whole = path.with_name("whole")
    list(curate(ASKED, DIRECT, echo, path=whole, **how))
    return path.read_bytes(), whole.read_bytes(), how


@pytest.mark.parametrize(
    ("lines", "calls"), [(256, ["2244", "5577", "99"]), (3, ["22", "4455", "77", "99"])]
)
def test_inputs_that_failed_are_asked_again_where_it_is_wanted(tmp_path, monkeypatch, lines, calls):
    monkeypatch.setattr("distill_ops.methods.system2.curation.BLOCK", lines)
    path, link = tmp_path / "records.jsonl", tmp_path / "link"
    before, whole, how = of_failures(path)
    link.symlink_to(path)
    path.chmod(0o640)
    again = Flaky(lambda call, prompts: False)
    assert [x.reason for x in curate(ASKED, DIRECT, again, path=path, **how)].count("failed") == 4
    assert again.calls == []
    assert path.read_bytes() == before
    more = [*ASKED, "9"]
    records = list(curate(more, DIRECT, again, path=link, retry_failed=True, **how))
    assert facts(records) == [(i, str(i), "kept") for i in range(10)]
    assert again.calls == [[*call] for call in calls]
    assert path.read_bytes().startswith(whole)
    assert list(read_records(path)) == records
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "records.jsonl", "whole"]


def test_what_is_asked_again_is_kept_whatever_ends_it(tmp_path):
    path = tmp_path / "records.jsonl"
    before, whole, how = of_failures(path)
    before, whole = before.splitlines(), whole.splitlines()
    curation = curate(ASKED, DIRECT, echo, path=path, retry_failed=True, **how)
    assert [next(curation).index for _ in range(4)] == [0, 1, 2, 3]
    curation.close()
    assert path.read_bytes().splitlines() == whole[:4] + before[4:]
    gone = Flaky(lambda call, prompts: "5" in prompts or "7" in prompts)
    how |= {"path": path, "retry_failed": True, "max_failures": 2}
    assert [index for index, *_ in stopped(curate(ASKED, DIRECT, gone, **how))] == [0, 1, 2, 3, 4]
    assert path.read_bytes().splitlines() == whole[:5] + before[5:]
    with pytest.raises(ValueError, match="other settings"):
        list(curate(ASKED, DIRECT, echo, **how | {"n": 3}))
    assert path.read_bytes().splitlines() == whole[:5] + before[5:]


def test_a_writer_that_is_killed_as_it_asks_again_has_changed_nothing(tmp_path):
    path = tmp_path / "records.jsonl"
    before, whole, how = of_failures(path)
    how |= {"path": path, "retry_failed": True}
    dies = lambda prompts: os.kill(os.getpid(), signal.SIGKILL) if "7" in prompts else echo(prompts)
    child = in_child(lambda: list(curate(ASKED, DIRECT, dies, **how)))
    assert status_of(child) == -signal.SIGKILL
    assert path.read_bytes() == before
    assert len(list(curate(ASKED, DIRECT, echo, **how))) == 9
    assert path.read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == ["records.jsonl", "whole"]


def test_async_failures_are_retried_after_as_long_a_wait(monkeypatch):
    calls, waits = [], []

    async def flaky(prompts):
        calls.append(len(prompts))
        if len(calls) <= 2:
            raise TimeoutError
        return echo(prompts)

    async def sleep(seconds):
        waits.append(seconds)

    async def inside():
        return [x async for x in curate(["1"], DIRECT, flaky, n=2, retry_wait_s=0.5)]

    monkeypatch.setattr(asyncio, "sleep", sleep)
    assert facts(asyncio.run(inside())) == [(0, "1", "kept")]
    assert calls == [2, 2, 2]
    assert waits == [0.0, 0.5, 1.0]
