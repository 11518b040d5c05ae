"""The scripts for a GPU, as far as they can run without one: stages, their limits, what a killed run
leaves, the time budget of the tests."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from io import BytesIO
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import parse as parse_dense
from benchmarks.gpu import check, graphs, measure, stages
from benchmarks.gpu.stages import Stage
from benchmarks.losses.forms import parse as parse_forms
from tests.conftest import SHARES
from tests.support import ROOT

FACTS = {"gpu": None, "cpu": "a CPU"}


def python(name: str, code: str, seconds: float = 30.0, **options) -> Stage:
    return Stage(name, seconds, (sys.executable, "-c", code), **options)


# --- stages --------------------------------------------------------------------------------------


def test_stages_are_kept_with_their_output_and_their_end(tmp_path):
    wanted = [
        python("good", "print('first'); print('=== 5 passed ===')"),
        python("bad", "print('1 wrong'); print('bye'); raise SystemExit(3)", summary="wrong"),
        Stage("absent", 5.0, reason="no such tool here"),
        python("last", "import os; print(os.environ['HERE'])", environment={"HERE": "there"}),
    ]
    screen = BytesIO()
    assert stages.run("checks", wanted, tmp_path / "new", 60.0, FACTS, screen) == 1
    log = (tmp_path / "new" / "checks.log").read_bytes()
    assert log == screen.getvalue()
    assert b"first\n=== 5 passed ===\n" in log
    kept = json.loads((tmp_path / "new" / "checks.json").read_text())
    assert kept["facts"] == FACTS
    ends = {x["name"]: (x["status"], x["exit_status"], x["note"]) for x in kept["stages"]}
    assert ends == {
        "good": (stages.PASSED, 0, "5 passed"),
        "bad": (stages.FAILED, 3, "1 wrong"),
        "absent": (stages.NOT_RUN, None, "no such tool here"),
        "last": (stages.PASSED, 0, "there"),
    }
    table = log.decode().partition("stage   status")[2]
    assert "no such tool here" in table
    assert "1 wrong" in table


def test_what_is_not_run_is_no_failure(tmp_path):
    wanted = [python("good", ""), Stage("absent", 5.0, reason="no such tool here")]
    assert stages.run("checks", wanted, tmp_path, 60.0, FACTS, BytesIO()) == 0


LAST_WORDS = """
import time
print("began")
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("2 failed so far")
"""
DEAF = (
    "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('on'); time.sleep(60)"
)


@pytest.mark.full
@pytest.mark.parametrize(
    ("code", "note"), [(LAST_WORDS, "2 failed so far"), (DEAF, "on")], ids=["interrupted", "killed"]
)
def test_a_stage_ends_at_its_limit_and_keeps_its_output(code, note, monkeypatch):
    monkeypatch.setattr(stages, "GRACE", 1.0)
    log = BytesIO()
    began = time.monotonic()
    outcome = stages.run_stage(python("slow", code), 2.0, [log])
    assert 2.0 <= time.monotonic() - began < 20.0
    assert (outcome.status, outcome.note, outcome.wrong) == (stages.TIMED_OUT, note, True)
    assert log.getvalue().splitlines()[-1] == note.encode()


@pytest.mark.full
def test_the_next_stages_get_what_time_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "GRACE", 0.5)
    wanted = [python("slow", DEAF, 30.0), python("late", "print('never')")]
    assert stages.run("checks", wanted, tmp_path, 2.0, FACTS, BytesIO()) == 1
    slow, late = json.loads((tmp_path / "checks.json").read_text())["stages"]
    assert slow["limit"] == pytest.approx(1.5, abs=0.2)
    assert (late["status"], late["note"]) == (stages.TIMED_OUT, "no time was left")
    assert b"\nnever\n" not in (tmp_path / "checks.log").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda x: x.name)
def test_a_killed_run_leaves_what_it_had(tmp_path, number):
    slow = "import os, time; print(os.getpid(), 'is on'); time.sleep(20)"
    wanted = [python("done", "print('all good')"), python("slow", slow)]
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as screen:
        run = multiprocessing.get_context("fork").Process(  # which has imported PyTorch already
            target=stages.run, args=("checks", wanted, tmp_path, 90.0, {}, screen)
        )
        run.start()
    with os.fdopen(reading, "rb") as output:
        child = next(line for line in output if line.endswith(b"is on\n")).split()[0]
        os.kill(run.pid, number)
        run.join(20)
    log = (tmp_path / "checks.log").read_bytes()
    assert b"all good" in log
    assert child + b" is on" in log
    done, slow = json.loads((tmp_path / "checks.json").read_text())["stages"]
    assert done["status"] == stages.PASSED
    if number == signal.SIGKILL:  # nobody was left to say more, or to end the stage
        assert slow["status"] == stages.RUNNING
        os.kill(int(child), signal.SIGKILL)
    else:
        assert slow["status"] == stages.INTERRUPTED
        assert b"interrupted" in log
        with pytest.raises(ProcessLookupError):
            os.kill(int(child), 0)


# --- the checks ----------------------------------------------------------------------------------

SUITE = """
import pytest

@pytest.mark.parametrize("n", range(50))
def test_first(n):
    pass

@pytest.mark.parametrize("n", range(50))
def test_second(n):
    pass

def test_third():
    pass
"""
A_SECOND_A_TEST = """
import pytest, time

now = 0.0
time.monotonic = lambda: now

@pytest.fixture(autouse=True)
def a_second():
    global now
    now += 1.0
"""


def budgeted(folder: Path, seconds: str) -> subprocess.CompletedProcess:
    (folder / "test_suite.py").write_text(SUITE)
    (folder / "conftest.py").write_text(A_SECOND_A_TEST)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "benchmarks.gpu.budget"]
    command += ["--budget", seconds, "-p", "no:cacheprovider", "--rootdir", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.full
def test_a_time_budget_is_spent_on_every_function_first(tmp_path):
    run = budgeted(tmp_path, "6")
    assert run.returncode == 0, run.stdout
    passed = [x.split("::")[1] for x in run.stdout.splitlines() if " PASSED" in x]
    assert [name.partition("[")[0].split()[0] for name in passed] == [
        "test_first", "test_second", "test_third", "test_first", "test_second", "test_first",
    ]  # fmt: skip
    assert "time for 6 tests in 6 s; 95 left out" in run.stdout
    nothing = budgeted(tmp_path, "0")
    assert nothing.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "101 left out" in nothing.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
@pytest.mark.parametrize("script", [check, measure, graphs], ids=lambda x: x.__name__)
def test_without_a_gpu_nothing_is_run(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert script.main([]) == stages.NO_GPU
    assert "needs a GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("script", "minutes"), [(check, 6), (measure, 5)])
def test_the_stages_fit_into_their_minutes(script, minutes, capsys, monkeypatch):
    monkeypatch.setenv("OUT", "/somewhere")
    # 10 seconds for Python and PyTorch to start
    assert sum(script.LIMITS.values()) + stages.GRACE * len(script.LIMITS) <= 60 * minutes - 10
    assert script.main(["--list", "--minutes", str(minutes / 2)]) == 0
    listed = capsys.readouterr().out
    for name, seconds in script.LIMITS.items():
        assert f"{name} (at most {seconds / 2:.0f} s): " in listed
    assert script.main(["--list", "--only", next(iter(script.LIMITS))]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    with pytest.raises(SystemExit):
        script.main(["--list", "--only", "nothing"])
    assert "no stage nothing" in capsys.readouterr().err
    if script is measure:
        assert "--json /somewhere/dense.json" in listed


FAKE = """#!/bin/sh
case "$*" in
  *--help*) echo "  --kernel-name arg" ;;
  *) echo "========= COMPUTE-SANITIZER"; echo "========= ERROR SUMMARY: 2 errors"; echo 1 passed; exit 99 ;;
esac
"""


def fake_sanitizer(folder: Path) -> Path:
    program = folder / check.SANITIZER
    program.write_text(FAKE)
    program.chmod(0o755)
    return program


def test_compute_sanitizer_where_it_is_and_where_it_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(check, "sanitizer_places", lambda: iter([tmp_path / "no" / "such"]))
    stage = check.sanitizer_stage("racecheck", check.find_sanitizer(), 40.0)
    assert stage.command == ()
    assert "neither on PATH" in stage.reason
    program = fake_sanitizer(tmp_path)
    assert check.find_sanitizer() == str(program)
    monkeypatch.setenv("PATH", "/no/such/folder")
    assert check.find_sanitizer() is None
    monkeypatch.setattr(check, "sanitizer_places", lambda: iter([program]))
    assert check.find_sanitizer() == str(program)
    stage = check.sanitizer_stage("racecheck", str(program), 40.0)
    assert "kernel_substring=scale_kernel" in stage.command
    assert stage.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    outcome = stages.run_stage(stage, 20.0, [])
    assert (outcome.status, outcome.exit_status) == (stages.FAILED, 99)
    assert outcome.note == "ERROR SUMMARY: 2 errors"


def test_what_the_stages_name_is_there(tmp_path):
    """Test files whose kernels' tests some process runs without a GPU too, and modules."""
    for name in check.SANITIZED:
        assert (ROOT / name).is_file(), name
        assert Path(name).parent.name in chain.from_iterable(SHARES.values())
    wanted = [*check.all_stages(6, tmp_path), *measure.all_stages(5, tmp_path)]
    commands = {stage.name: stage.command for stage in wanted}
    assert set(commands) == {*check.LIMITS, *measure.LIMITS}
    for tool in check.TOOLS:
        commands[tool] = check.sanitizer_stage(tool, str(fake_sanitizer(tmp_path)), 40.0).command
    for name, command in commands.items():
        modules = [word for flag, word in pairwise(command) if flag in ("-m", "-p")]
        modules = [word for word in modules if word.startswith("benchmarks")]
        assert modules, name
        for module in modules:
            spec = find_spec(module)
            assert spec, module
            assert not spec.submodule_search_locations or find_spec(f"{module}.__main__"), module
    for name, parse in (("dense", parse_dense), ("graphs", graphs.parse), ("forms", parse_forms)):
        assert parse(commands[name][3:]).json == tmp_path / f"{name}.json"


@pytest.mark.full
def test_tests_are_there_for_compute_sanitizer():
    """Of each file, and none that compiles for long."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "interpreter", "-k", check.NOT_SANITIZED, *check.SANITIZED]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = [line for line in run.stdout.splitlines() if "::" in line]
    for name in check.SANITIZED:
        assert sum(line.startswith(f"{name}::") for line in found) >= 20, name
    assert not any("opcheck" in line for line in found)
