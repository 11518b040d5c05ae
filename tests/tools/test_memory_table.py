"""The table of memory: its formulas against measured peaks and counted allocations, and the page."""

import json
import re
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from distill_ops.kernels.launch import TOPK_STATISTICS, DeviceFacts

from benchmarks.core.machine import RESULTS, ROOT
from benchmarks.losses.cases import LOSSES
from benchmarks.losses.eager import FORMULAS, soft_cross_entropy
from benchmarks.memory import cpu, gpu
from benchmarks.memory.gpu import H100, dense, linear, topk_scratch
from benchmarks.memory.sizes import EAGER, FLOAT, Sizes, eager, stored_bytes_a_token
from benchmarks.memory_table import (
    BEGIN,
    END,
    TOKENS,
    VOCABULARIES,
    main,
    markdown,
    page_sizes,
    rows_of,
)  # fmt: skip
from distill_ops import (
    distillation_loss,
    linear_distillation_loss,
    linear_topk_distillation_loss,
    teacher_topk,
    topk_distillation_loss,
)
from tests.support.allocations import Allocations, launching_nothing, measured_peak

MODES = {"forward": {}, "backward": {"gradient": "backward"}, "inplace": {"inplace": True}}
PAGE = (ROOT / "docs/memory.md").read_text(encoding="utf-8")


class Tensors:
    """Those of a call; on the meta device they have no memory."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: str):
        new = partial(torch.randn, dtype=dtype, device=device)
        n, vocab = sizes.tokens, sizes.vocab
        self.student = new(n, vocab).requires_grad_()
        self.teacher = new(n, vocab)
        self.hidden = new(n, sizes.hidden).requires_grad_()
        self.weight = new(vocab, sizes.hidden).requires_grad_(not sizes.frozen_head)
        self.teacher_hidden = new(n, sizes.teacher_hidden)
        self.teacher_weight = new(vocab, sizes.teacher_hidden)
        self.labels = torch.zeros(n, dtype=torch.int64, device=device)
        if device == "meta":
            self.log_probs = torch.empty(n, sizes.k, device=device)
            self.ids = torch.empty(n, sizes.k, dtype=torch.int64, device=device)
        else:
            self.log_probs, self.ids = teacher_topk(self.teacher.float(), sizes.k)

    def run(self, form: str, sizes: Sizes, **options):
        """Forward and backward of a form, as a function of nothing."""
        student = self.student * 1 if options.get("inplace") else self.student  # no leaf
        head = self.hidden, self.weight
        blocks = {"memory_budget": sizes.memory_budget}
        slots = self.log_probs, self.ids
        loss, leaves = {
            "dense": (partial(distillation_loss, student, self.teacher), [student]),
            "topk": (partial(topk_distillation_loss, student, *slots), [student]),
            "linear": (
                partial(
                    linear_distillation_loss,
                    *head,
                    self.teacher_hidden,
                    self.teacher_weight,
                    **blocks,
                ),
                head,
            ),
            "linear_topk": (partial(linear_topk_distillation_loss, *head, *slots, **blocks), head),
        }[form]
        leaves = [x for x in leaves if x.requires_grad]
        return lambda: torch.autograd.grad(loss(labels=self.labels, **options), leaves)


SMALL = Sizes(256, 4096, hidden=64, teacher_hidden=96, k=128)
CPU_FORMULAS = {
    "dense": lambda sizes, mode: cpu.dense(sizes, mode, threads=1),
    "topk": lambda sizes, mode: cpu.topk(sizes, threads=1),
    "linear": lambda sizes, mode: cpu.linear(sizes, threads=1),
    "linear_topk": lambda sizes, mode: cpu.linear(sizes, threads=1, topk=True),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("form", "mode", "changed"),
    [
        ("dense", "forward", {}),
        ("dense", "backward", {}),
        ("dense", "inplace", {}),
        ("topk", "forward", {}),
        ("linear", "forward", {}),
        ("linear", "forward", {"memory_budget": 2 << 20}),
        ("linear", "forward", {"memory_budget": 2 << 20, "frozen_head": True}),
        ("linear_topk", "forward", {"memory_budget": 2 << 20}),
    ],
)
def test_the_cpu_path_takes_what_the_formula_says(form, mode, changed, dtype):
    sizes = replace(SMALL, itemsize=dtype.itemsize, **changed)
    run = Tensors(sizes, dtype, "cpu").run(form, sizes, **MODES[mode])
    run()  # what is made once
    predicted = CPU_FORMULAS[form](sizes, mode).peak
    assert predicted == pytest.approx(measured_peak(run), rel=0.01)


@pytest.mark.parametrize("compute", [torch.float32, None], ids=["float32", "native"])
def test_eager_pytorch_takes_what_the_formula_says(compute):
    tensors = Tensors(SMALL, torch.bfloat16, "cpu")
    student, itemsize = tensors.student, FLOAT if compute else 2

    def run():
        torch.autograd.grad(soft_cross_entropy(student, tensors.teacher, compute), student)

    run()
    found = eager(SMALL, itemsize)
    assert found.peak == pytest.approx(measured_peak(run), rel=0.001)
    on_meta = Tensors(SMALL, torch.bfloat16, "meta")
    with Allocations(on_meta.student, on_meta.teacher) as seen:
        loss = soft_cross_entropy(on_meta.student, on_meta.teacher, compute)
        kept = seen.held
        loss.backward()
    assert kept == pytest.approx(found.saved, rel=0.001)
    assert seen.peak == pytest.approx(found.peak, rel=0.001)


@pytest.mark.parametrize("compute", [torch.float32, None], ids=["float32", "native"])
def test_eager_pytorch_of_every_divergence(compute):
    assert set(EAGER) == set(LOSSES)
    for name, formula in FORMULAS.items():
        student, teacher = torch.empty(2, 500, 1000, dtype=torch.bfloat16, device="meta")
        student.requires_grad_()
        with Allocations(student, teacher) as seen:
            formula(student, teacher, compute).backward()
        expected = EAGER[name].bytes(4 if compute else 2) * teacher.numel()
        assert seen.peak == pytest.approx(expected, rel=0.002), name


def test_the_count_frees_what_nobody_holds():
    x = torch.empty(1000, device="meta")
    with Allocations(x) as seen:
        first = x + 1
        second = first * 2
        assert (seen.held, seen.peak) == (8000, 8000)
        del first
        assert (seen.held, seen.peak) == (4000, 8000)
        view = second[:10]
        del second
        assert seen.held == 4000
        del view
    assert (seen.held, seen.peak) == (0, 8000)


ON_GPU = [  # a form of the program's lines, in their order
    ("dense", {}), ("dense", MODES["backward"]), ("dense", MODES["inplace"]), ("topk", {}),
    ("linear", {}), ("linear", {}), ("linear", {}), ("linear_topk", {}),
]  # fmt: skip
CHANGED = {5: {"memory_budget": 256 << 20}, 6: {"frozen_head": True}}


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(8192, 128256),
        Sizes(32768, 151936),
        Sizes(8192, 262144),
        Sizes(1000, 50257, hidden=768, teacher_hidden=1024, k=100),
    ],
    ids=lambda sizes: f"{sizes.tokens}x{sizes.vocab}",
)
def test_the_gpu_path_allocates_what_the_formula_says(sizes):
    """To the byte, at the page's own sizes."""
    pytest.importorskip("triton")
    lines = rows_of(sizes)[2:]
    assert len(lines) == len(ON_GPU)
    for i, ((name, found), (form, options)) in enumerate(zip(lines, ON_GPU, strict=True)):
        its_sizes = replace(sizes, **CHANGED.get(i, {}))
        tensors = Tensors(its_sizes, torch.bfloat16, "meta")
        with launching_nothing(H100):
            run = tensors.run(form, its_sizes, backend="triton", **options)
            with Allocations(*vars(tensors).values()) as seen:
                if options.get("inplace"):  # the student's logits that are no leaf
                    seen.known.add(inplace_logits(run))
                run()
        assert (name, seen.peak) == (name, found.peak)


def inplace_logits(run) -> int:
    """The storage that a run will overwrite."""
    (leaves,) = [c.cell_contents for c in run.__closure__ if isinstance(c.cell_contents, list)]
    return leaves[0].untyped_storage()._cdata


@pytest.mark.interpreter
@pytest.mark.parametrize(("form", "mode"), [("dense", "backward"), ("topk", "forward")])
def test_kernels_that_run_allocate_no_more(form, mode, kernel_device):
    """Where the kernels do run: in the interpreter, whose device facts these are."""
    if kernel_device("triton") == "cuda":
        pytest.skip("of the interpreter")
    facts = DeviceFacts(n_sm=2, l2_bytes=1 << 20)
    sizes = replace(SMALL, tokens=8)
    run = Tensors(sizes, torch.bfloat16, "cpu").run(form, sizes, backend="triton", **MODES[mode])
    run()
    found = gpu.dense(sizes, mode) if form == "dense" else gpu.topk(sizes, facts)
    assert measured_peak(run) == pytest.approx(found.peak, abs=16 * sizes.tokens + 64)


def test_what_comes_after_a_loss_of_logits():
    """From the logits to the gradients of hidden states and head."""
    pytest.importorskip("triton")
    sizes = Sizes(8192, 128256)
    t = Tensors(sizes, torch.bfloat16, "meta")
    for mode, line in (("forward", 2), ("inplace", 4)):
        with launching_nothing(H100), Allocations(*vars(t).values()) as seen:
            logits = t.hidden @ t.weight.t()
            options = {"labels": t.labels, "backend": "triton", **MODES[mode]}
            distillation_loss(logits, t.teacher, **options).backward()
        found = rows_of(sizes)[line][1]
        others = t.labels.nbytes + t.teacher.nbytes  # of its inputs, there before
        assert seen.peak + others == pytest.approx(found.total, rel=1e-4)
        t.hidden.grad = t.weight.grad = None


@pytest.mark.parametrize("mode", ["forward", "inplace"])
def test_a_slice_of_the_logits_takes_a_second_gradient(mode):
    pytest.importorskip("triton")
    size = 4 * 512 * 32000 * 2

    def peak(length: int) -> int:
        shape = {"dtype": torch.bfloat16, "device": "meta"}
        student = torch.empty(4, 512, 32000, requires_grad=True, **shape) * 1  # no leaf
        teacher = torch.empty(4, 512, 32000, **shape)
        labels = torch.empty(4, 512, dtype=torch.int64, device="meta")
        with launching_nothing(H100), Allocations(student, teacher, labels) as seen:
            part = student if length == 512 else student[:, :length]
            options = {"labels": labels[:, :length], "backend": "triton", **MODES[mode]}
            loss = distillation_loss(part, teacher[:, :length], **options)
            torch.autograd.grad(loss, student)
        return seen.peak

    whole = 0 if mode == "inplace" else size
    assert peak(512) == pytest.approx(whole, abs=1e6)
    assert peak(511) == pytest.approx(whole + size, rel=0.01)


def test_peaks_that_were_measured_for_the_readme_agree():
    """Resident memory, which counts the pages that were touched: up to a few buffers of a chunk less."""
    sizes = Sizes(256, 151936)
    expected = {"eager": eager(sizes, FLOAT).peak, "native": eager(sizes, 2).peak}
    records = json.loads((RESULTS / "cpu.json").read_text())
    threads = records[0]["threads"]
    ways = {"ours": "forward", "ours_backward": "backward", "ours_inplace": "inplace"}
    expected |= {name: cpu.dense(sizes, mode, threads).peak for name, mode in ways.items()}
    case = "soft_cross_entropy 256x151936 bfloat16"
    found = {
        r["provider"]: r["peak_bytes"]
        for r in records
        if r["case"] == case and r.get("mode") == "train" and r["provider"] in expected
    }
    assert found.keys() == expected.keys()
    for name, peak in expected.items():
        assert found[name] == pytest.approx(peak, rel=0.01, abs=6 << 20), name


def test_the_page_is_what_the_program_writes(tmp_path, capsys):
    assert f"{BEGIN}\n{markdown(page_sizes())}\n{END}" in PAGE
    page = tmp_path / "memory.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    main(["--page", str(page)])
    assert page.read_text() == f"before\n{BEGIN}\n{markdown(page_sizes())}\n{END}\nafter\n"
    main(["--vocab", "1000", "--tokens", "8", "--hidden", "16", "--cpu-threads", "2"])
    printed = capsys.readouterr().out
    assert "| 1000, 8 tokens | inputs |" in printed
    assert BEGIN not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens: expected a whole number of at least 1, got '0'"),
        (["--vocab", "many"], "--vocab: expected a whole number of at least 1, got 'many'"),
        (["--k", "1025"], "--k: expected at most 1024, got 1025"),
        (["--memory-budget", "1000"], "memory_budget=1000 is too small"),
    ],
)
def test_what_is_no_size_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_linear_forms_keep_within_their_budget_and_grow_little_with_the_tokens():
    pytest.importorskip("triton")
    for vocab in VOCABULARIES:
        few, many = (linear(Sizes(tokens, vocab)).total for tokens in TOKENS)
        assert 1.15 < many / few < 1.3  # as the page says
        for tokens, frozen, budget, topk in product(
            TOKENS, (False, True), (None, 256 << 20), (False, True)
        ):
            sizes = Sizes(tokens, vocab, frozen_head=frozen, memory_budget=budget)
            on_top = 0 if frozen else vocab * sizes.hidden * FLOAT  # the sum of the head's gradient
            on_top += 10 * tokens + (topk_scratch(sizes, H100) if topk else 0)
            allowed = (budget or 1 << 30) + on_top
            assert linear(sizes, topk=topk).temporary <= allowed, (sizes, topk)


def page(name: str) -> str:
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def test_other_pages_agree():
    """Figures that they state of memory, from the same formulas."""
    llama = Sizes(8192, 128256)
    of_token = dense(replace(llama, tokens=1000), "backward").saved / 1000
    assert f"{of_token:.0f} bytes a token" in page("docs/dense.md")
    assert f"it keeps {of_token:.0f} bytes a token" in " ".join(PAGE.split())
    assert f"or {TOPK_STATISTICS * FLOAT} bytes a token" in page("docs/topk.md")
    assert f"{topk_scratch(llama, H100) / 1e6:.1f} MB on an H100" in page("docs/topk.md")
    assert f"K = 64 is {stored_bytes_a_token(64)} bytes a token" in page("docs/teacher-store.md")
    assert f"{eager(llama, FLOAT).peak // llama.n_logits} bytes a logit" in PAGE
    assert f"{eager(llama, FLOAT).saved // llama.n_logits} of them until" in PAGE

    stated = re.search(
        r"by count: one block of (\S+) GB and (\S+) GB of rows under work, against (\S+) GB and a sum of "
        r"(\S+) GB",
        page("docs/linear.md"),
    )
    block, under_work, budget, summed = map(float, stated.groups())
    assert llama.logits == pytest.approx(block * 1e9, abs=0.05e9)
    assert llama.vocab * llama.hidden * FLOAT == pytest.approx(summed * 1e9, abs=0.05e9)
    assert 1 << 30 == pytest.approx(budget * 1e9, abs=0.05e9)
    copies = llama.of_hidden + 1e6  # hidden states that are masked, and what is a number a token
    rest = linear(llama).temporary - llama.logits - copies
    assert rest == pytest.approx(under_work * 1e9, abs=0.05e9)
