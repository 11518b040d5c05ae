"""The benchmark's own parts: the run, its check, its memory figures and its report."""

import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import report
from benchmarks.__main__ import default_output, main, parse
from benchmarks.core.machine import RESULTS, ROOT
from benchmarks.core.markdown import replace_marked
from benchmarks.core.memory import kept_above_inputs, peak_above_inputs
from benchmarks.core.records import SKIPPED, load, save
from benchmarks.core.screen import mebibytes, number
from benchmarks.core.timing import Budget
from benchmarks.losses import report as dense_report
from benchmarks.losses.cases import LOSSES, Case, Inputs, make_inputs, select_cases
from benchmarks.losses.check import Wrong, allowed, make_truth, measure_errors, require, run_once
from benchmarks.losses.eager import FORMULAS
from benchmarks.losses.forms import FormRecord
from benchmarks.losses.harness import run_case
from benchmarks.losses.providers import PROVIDERS, Provider
from benchmarks.losses.records import COPY, OVERHEAD, WAYS, Record
from distill_ops import reference
from distill_ops.divergences import BUILT_IN

CPU = torch.device("cpu")
MIB = 1 << 20
TINY = ["--quick", "--device", "cpu", "--shapes", "16x64", "--losses", "forward_kl"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run from the command line: its exit status, JSON and plot."""
    folder = tmp_path_factory.mktemp("run")
    json, plot = folder / "new" / "run.json", folder / "run.png"
    outputs = ["--json", str(json), "--plot", str(plot)]
    return main([*TINY, "--providers", "eager", *WAYS, "fla", *outputs]), json, plot


def test_run_writes_a_record_with_every_number_for_each_measurement(run):
    status, json, plot = run
    records, facts = load(json, Record)
    assert status == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    timed = {(r.provider, r.mode): r for r in records if r.measured and r.case != OVERHEAD}
    both = {(p, m) for p in ("eager", "ours", COPY) for m in ("train", "eval")}
    assert set(timed) == both | {("ours_backward", "train"), ("ours_inplace", "train")}
    for (provider, mode), record in timed.items():
        not_for_a_copy = {
            "peak_bytes", "kept_bytes", "value_error", "gradient_error", "error_ratio",
        }  # fmt: skip
        expected = not_for_a_copy if provider == COPY else set()
        if mode == "eval":
            expected = expected | {"kept_bytes"}  # no backward follows
        missing = {name for name, value in vars(record).items() if value is None}
        missing -= {"reason", "model"}  # nobody's vocabulary has 64 tokens
        assert missing == expected, (provider, mode)
        assert 0 < record.low_ms <= record.median_ms <= record.high_ms
    assert timed["ours", "train"].minimal_bytes == 3 * 16 * 64 * 4
    assert timed["eager", "train"].times_baseline == 1
    for name in ("cpu", "cores", "python", "torch", "date", "command"):
        assert facts[name], name


def test_a_skipped_provider_is_recorded_with_its_reason(run):
    records, _ = load(run[1], Record)
    (fla,) = [r for r in records if r.provider == "fla"]
    assert fla.status == SKIPPED
    assert "hidden states" in fla.reason
    assert fla.median_ms is None


def test_overhead_is_recorded_for_every_loss(run):
    records, _ = load(run[1], Record)
    assert [r.loss for r in records if r.case == OVERHEAD] == ["kl_div", *LOSSES]


def rows_of(text, loss):
    lines = [line for line in text.splitlines() if line.startswith(f"| {loss} ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_report_writes_the_readmes_part_and_the_page(run, tmp_path, capsys):
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"
    readme.write_text(f"before\n{report.BEGIN}\nof before\n{report.END}\nafter\n")
    report.main([str(run[1]), "--readme", str(readme), "--page", str(page)])
    printed, text = capsys.readouterr().out.strip(), readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n![")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "(docs/benchmarks.md)" in text
    assert "of before" not in text
    assert printed in text
    records, facts = load(run[1], Record)
    ours = next(r for r in records if r.provider == "ours" and r.mode == "train")
    ((_, shape, _, compiled, its_ms, *_),) = rows_of(text, "forward_kl")
    assert shape == "[16, 64] float32"
    assert compiled == "–"  # torch.compile did not run
    assert float(its_ms) == pytest.approx(ours.median_ms, rel=0.1, abs=0.01)
    assert facts["commit"] is None or facts["commit"] in text
    assert dense_report.markdown(records, facts) in page.read_text()


def test_the_readme_shows_few_lines_and_those_that_it_names():
    dense, _ = load(RESULTS / "cpu.json", Record)
    forms, _ = load(RESULTS / "forms-cpu.json", FormRecord)
    rows = report.readme_table(dense, forms)[2:]
    names = [row.split("|")[1].strip() for row in rows]
    assert names == [*report.DENSE, *map(" ".join, report.FORMS)]
    assert len(rows) <= 10


def test_the_page_and_the_readme_are_what_the_json_gives():
    dense = load(RESULTS / "cpu.json", Record)
    forms = load(RESULTS / "forms-cpu.json", FormRecord)
    picture = "benchmarks/results/cpu.png"
    text = report.page(dense, forms, f"../{picture}")
    assert (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8") == text
    facts = dense[1], forms[1]
    part = report.readme_part(dense[0], forms[0], *facts, picture, "docs/benchmarks.md")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{report.BEGIN}\n{part}\n{report.END}" in readme


def test_only_a_text_with_both_markers_is_changed():
    with pytest.raises(ValueError, match="once each"):
        replace_marked("no markers", "table", report.BEGIN, report.END)


def test_report_compares_the_ways_to_hold_the_gradient(run):
    records, facts = load(run[1], Record)
    lines = dense_report.markdown(records, facts).splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("| [16, 64] float32 |"))
    names, _, row = ([cell.strip() for cell in line.split("|")] for line in lines[header:][:3])
    cells = dict(zip(names, row, strict=True))
    assert row[1] == "forward_kl"
    ways = {r.provider: r for r in records if r.provider in WAYS and r.mode == "train"}
    for provider, way in WAYS.items():
        its = next(r for r in records if r.provider == provider and r.case != OVERHEAD)
        assert cells[f"{way}, ms"] == number(its.median_ms)
        assert cells[f"peak MiB, {way}"] == mebibytes(its.peak_bytes)
        assert cells[f"kept MiB, {way}"] == mebibytes(its.kept_bytes)
    without = [r for r in records if r.provider != "ours_backward"]
    assert len(ways) == len(WAYS)
    assert "kept MiB" not in dense_report.markdown(without, facts)


def test_report_shows_the_ways_at_one_shape_and_every_case_in_the_first_table(run):
    records, facts = load(run[1], Record)
    measured = [r for r in records if r.case != OVERHEAD]
    more = [
        replace(r, case=f"{loss} {tokens}", loss=loss, tokens=tokens)
        for tokens in (16, 32)
        for loss in LOSSES
        for r in measured
    ]
    first, second = dense_report.markdown(more, facts).split("kept MiB", 1)
    assert sum(
        line.startswith(tuple(f"| {loss} |" for loss in LOSSES)) for line in first.splitlines()
    ) == 2 * len(LOSSES)
    assert sum(
        line.startswith(tuple(f"| {loss} |" for loss in LOSSES)) for line in second.splitlines()
    ) == len(LOSSES)


def test_records_survive_a_round_trip(run, tmp_path):
    records, facts = load(run[1], Record)
    changed = [replace(records[0], median_ms=1.5), *records[1:]]
    save(tmp_path / "copy.json", changed, facts)
    assert load(tmp_path / "copy.json", Record) == (changed, facts)


def test_every_built_in_divergence_has_an_eager_formula():
    assert set(FORMULAS) == set(LOSSES) == set(BUILT_IN)


@pytest.mark.parametrize("loss", LOSSES)
def test_eager_formula_is_the_references(loss):
    student, teacher = make_inputs(Case(loss, 5, 41, "float64"), CPU)
    value = run_once(lambda s, t: FORMULAS[loss](s, t, torch.float64), student, teacher)
    expected_student = student.detach().requires_grad_()
    expected = run_once(
        lambda s, t: reference.distillation_loss(s, t, divergence=loss), expected_student, teacher
    )
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    scale = expected_student.grad.abs().max().item()
    torch.testing.assert_close(student.grad, expected_student.grad, rtol=1e-12, atol=1e-13 * scale)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_eager_formula_upcasts_half_precision(loss):
    case = Case(loss, 5, 41, "bfloat16")
    student, teacher = make_inputs(case, CPU)
    upcast = FORMULAS[loss](student, teacher, torch.float32)
    native = FORMULAS[loss](student, teacher, None)
    exact = reference.distillation_loss(student.double(), teacher.double(), divergence=loss)
    assert (upcast.dtype, native.dtype) == (torch.float32, torch.bfloat16)
    assert abs(upcast.item() - exact.item()) < 1e-5 * exact.item()


def test_a_loss_in_place_gets_the_same_logits_in_every_run():
    case = Case("reverse_kl", 6, 50, "float32")
    student, teacher = make_inputs(case, CPU)
    logits = student.detach().clone()
    inputs = Inputs(student, teacher, overwritten=True)
    fresh = run_once(PROVIDERS["ours"].build(case, CPU), student, teacher)
    gradient = student.grad.clone()
    function = PROVIDERS["ours_inplace"].build(case, CPU)
    for _ in range(3):
        inputs.reset()
        assert student.grad is None
        given = inputs.student_for(inplace=True)
        assert torch.equal(given, logits)
        assert torch.equal(run_once(function, given, teacher), fresh)
        assert torch.equal(student.grad, gradient)
        assert student.grad.data_ptr() == given.data_ptr()  # no copy on its way to the leaf
        assert torch.equal(student, logits)
    assert inputs.student_for(inplace=False) is student


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_the_ways_to_hold_the_gradient():
    case = Case("soft_cross_entropy", 256, 32768, "float32")
    providers = [PROVIDERS[name] for name in WAYS]
    records = run_case(case, providers, CPU, Budget(0.0, 1, 1), step=lambda text: None)
    peak = {r.provider: r.peak_bytes for r in records if r.mode == "train"}
    kept = {r.provider: r.kept_bytes for r in records if r.mode == "train"}
    gradient = case.logits_bytes
    assert gradient <= peak["ours"] + MIB < gradient + 17 * MIB
    assert gradient <= peak["ours_backward"] + MIB < gradient + 17 * MIB
    assert 0 < peak["ours_inplace"] < gradient / 2
    assert kept["ours"] == pytest.approx(gradient, abs=MIB)
    assert abs(kept["ours_backward"]) < MIB
    assert abs(kept["ours_inplace"]) < MIB


def flip(column):
    """The total variation with the other sign of one column's slope; its value is right."""

    def loss(student, teacher):
        distances = (student.softmax(-1) - teacher.softmax(-1)).abs() / 2
        flipped = distances[:, column]
        return (distances.sum(-1) + 2 * (flipped.detach() - flipped)).mean()

    return loss


def test_either_sign_is_right_where_rounding_decides_the_total_variation():
    case = Case("total_variation", 16, 512, "float32")
    student, teacher = make_inputs(case, CPU, distinct=8)
    largest = student.detach().softmax(-1).mean(0).argmax().item()
    column = (largest + 1) % 512

    def check(flipped, teacher):
        truth = make_truth(case, student, teacher)
        inputs = Inputs(student, teacher, overwritten=False)
        require(measure_errors(flip(flipped), inputs, truth), allowed(truth, False, None))

    with pytest.raises(Wrong, match="gradient error"):
        check(column, teacher)
    equal = teacher.double()
    for _ in range(20):  # until q = p in this column
        log_q, log_p = (x.detach().double().log_softmax(-1)[:, column] for x in (student, equal))
        equal[:, column] += log_q - log_p
    check(column, equal.float())
    with pytest.raises(Wrong, match="gradient error"):
        check(largest, equal.float())
    assert not make_truth(replace(case, loss="forward_kl"), student, equal.float()).undecided.any()


def corrupt_gradient(change):
    """Ours, with the student's gradient changed on its way out."""

    def build(case, device):
        right = PROVIDERS["ours"].build(case, device)

        def loss(student, teacher):
            if student.requires_grad and torch.is_grad_enabled():
                student = student.view_as(student)
                student.register_hook(change)
            return right(student, teacher)

        return loss

    return build


def corrupt_value(case, device):
    right = PROVIDERS["ours"].build(case, device)
    return lambda student, teacher: right(student, teacher) + 0.01


def another_divergence(case, device):
    return PROVIDERS["ours"].build(replace(case, loss="reverse_kl"), device)


WRONG = {
    "zero gradient": corrupt_gradient(torch.zeros_like),
    "gradient 5% too large": corrupt_gradient(lambda g: g * 1.05),
    "gradient of the next row": corrupt_gradient(lambda g: g.roll(1, 0)),
    "NaN in the gradient": corrupt_gradient(
        lambda g: g.index_fill(0, torch.tensor([9]), torch.nan)
    ),
    "value off by 0.01": corrupt_value,
    "another divergence": another_divergence,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("build", WRONG.values(), ids=WRONG)
def test_check_rejects_a_wrong_provider(build, dtype):
    case = Case("forward_kl", 16, 512, dtype)
    student, teacher = make_inputs(case, CPU, distinct=8)
    truth = make_truth(case, student, teacher)
    inputs = Inputs(student, teacher, overwritten=False)

    def errors(builder):
        return measure_errors(builder(case, CPU), inputs, truth)

    yardstick = errors(PROVIDERS["eager"].build)
    require(yardstick, allowed(truth, False, None))
    limits = allowed(truth, False, yardstick)
    require(errors(PROVIDERS["ours"].build), limits)
    with pytest.raises(Wrong, match="error"):
        require(errors(build), limits)


def test_a_provider_that_fails_is_reported_and_not_timed():
    def broken(case, device):
        return lambda student, teacher: student.no_such_method()

    bad = [
        Provider("wrong", "wrong", corrupt_value),
        Provider("broken", "broken", broken),
    ]
    case = Case("jensen_shannon", 10, 32, "float32")  # 10 is no multiple of the distinct rows
    records = run_case(
        case, [*bad, PROVIDERS["ours"]], CPU, Budget(0.0, 3, 3), step=lambda text: None
    )
    by_provider = {r.provider: r for r in records}
    assert set(by_provider) == {"wrong", "broken", "ours", COPY}
    assert by_provider["wrong"].reason.startswith("Wrong: value error")
    assert by_provider["broken"].reason.startswith("AttributeError")
    assert {r.provider for r in records if r.measured} == {"ours", COPY}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("mebibytes", [4, 100])
def test_peak_memory_of_known_tensors(mebibytes):
    def run():
        return torch.ones(mebibytes * MIB, dtype=torch.uint8) + 1  # two at once

    run()
    peaks = [peak_above_inputs(run, CPU) for _ in range(3)]
    assert sorted(peaks)[1] == pytest.approx(2 * mebibytes * MIB, abs=MIB)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_kept_of_known_tensors():
    def forward():
        return torch.ones(60 * MIB, dtype=torch.uint8) + 1  # the first is dropped

    forward()
    assert kept_above_inputs(forward, CPU) == pytest.approx(60 * MIB, abs=MIB)


def test_only_a_full_run_has_a_default_output():
    assert default_output(parse(["--device", "cpu"])).name == "cpu"
    for partial in (["--quick"], ["--dtype", "float32"], ["--providers", "eager", "ours"]):
        assert default_output(parse(["--device", "cpu", *partial])) is None


def test_shapes_and_dtypes_multiply():
    cases = select_cases("cpu", True, ("forward_kl",), [(2, 3), (4, 5)], ("float32", "bfloat16"))
    assert len(cases) == len(set(cases)) == 4
    with pytest.raises(SystemExit):
        parse(["--shapes", "1024"])
