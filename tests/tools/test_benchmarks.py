"""A run of the benchmark from the command line, and the reports that are made of its JSON."""

from dataclasses import replace

import pytest

from benchmarks import report
from benchmarks.__main__ import default_output, main, parse
from benchmarks.core.machine import RESULTS, ROOT
from benchmarks.core.markdown import replace_marked
from benchmarks.core.records import SKIPPED, load, save
from benchmarks.core.screen import mebibytes, number
from benchmarks.losses import minillm
from benchmarks.losses import report as dense_report
from benchmarks.losses.cases import LOSSES, select_cases
from benchmarks.losses.forms import FormRecord
from benchmarks.losses.forms import main as forms_main
from benchmarks.losses.records import COPY, OVERHEAD, WAYS, Record

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


@pytest.mark.parametrize("name", report.METHODS)
def test_a_methods_page_has_the_table_of_its_json(name):
    text = (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")
    assert f"{report.BEGIN}\n{report.method_part(name)}\n{report.END}" in text


def test_minillm_costs_little_more_than_its_statistics():
    """Of the committed run: what it was built for."""
    records, _ = load(RESULTS / report.METHODS["minillm"], FormRecord)
    found = {r.provider: r for r in records if r.measured}
    gradient = records[0].tokens * records[0].vocab * 4
    assert (records[0].tokens, records[0].vocab, records[0].dtype) == (512, 16384, "float32")
    for ours in (found["ours"], found["first_update"]):
        assert ours.median_ms <= 1.15 * found[minillm.STATISTICS].median_ms
        assert ours.times_eager >= 4
        assert ours.peak_bytes <= gradient + 12 * 2**20  # some rows at a time beside the gradient


def test_the_quick_form_of_minillm(tmp_path):
    path = tmp_path / "minillm.json"
    options = ["--quick", "--forms", "minillm", "--seconds", "0.01", "--device", "cpu"]
    assert forms_main([*options, "--json", str(path)]) == 0
    records, _ = load(path, FormRecord)
    errors = {r.provider: r.error for r in records if r.measured}
    assert set(errors) == {"eager", "ours", "first_update", minillm.STATISTICS}
    assert max(errors.values()) < 1e-4  # of each, against its own truth in float64


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


def test_only_a_full_run_has_a_default_output():
    assert default_output(parse(["--device", "cpu"])).name == "cpu"
    for partial in (["--quick"], ["--dtype", "float32"], ["--providers", "eager", "ours"]):
        assert default_output(parse(["--device", "cpu", *partial])) is None


def test_shapes_and_dtypes_multiply():
    cases = select_cases("cpu", True, ("forward_kl",), [(2, 3), (4, 5)], ("float32", "bfloat16"))
    assert len(cases) == len(set(cases)) == 4
    with pytest.raises(SystemExit):
        parse(["--shapes", "1024"])
