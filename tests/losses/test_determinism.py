"""The same inputs give the same bits, run after run, wherever they lie in memory.

Between the runs memory is filled with NaN and given back, so that buffers come from other places
and an entry that is read before it is written shows.
"""

import random

import pytest
import torch

from distill_ops import distillation_loss
from distill_ops.cpu import dense
from tests.support.cases import DIVERGENCES
from tests.support.helpers import make_logits, run

RUNS = 10
OPTIONS = {
    "forward": {},
    "backward": {"gradient": "backward"},
    "none": {"reduction": "none"},
    "hard": {"hard_label_weight": 0.4, "temperature": 2.0},
}


@pytest.fixture(params=[False, True], ids=["", "deterministic"])
def deterministic_mode(request):
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """Sets PyTorch's number of threads for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def disturb(generator, size, device):
    """Leave free blocks full of NaN behind; returns some that stay, so that addresses move."""
    sizes = [generator.randint(1, 2 * size) for _ in range(8)]
    blocks = [torch.full((n,), float("nan"), device=device) for n in sizes]
    generator.shuffle(blocks)
    return blocks[::2]


def ten_runs(student, teacher, loss_function=distillation_loss, **options):
    """How many of RUNS results differ in a bit from the first; how many addresses the student's
    logits had."""
    generator, kept = random.Random(0), []
    first, distinct, addresses = None, 0, set()
    for _ in range(RUNS):
        kept = [*kept[-2:], disturb(generator, student.numel(), student.device)]
        pair = student.clone(), teacher.clone()
        addresses.add(pair[0].data_ptr())
        result = run(loss_function, *pair, **options)
        first = first or result
        distinct += not all(map(torch.equal, first, result))
    assert all(tensor.isfinite().all() for tensor in first)
    return distinct, len(addresses)


def labels_of(logits):
    """Labels ``[N]`` of logits ``[N, V]``, one of them ignored."""
    labels = torch.arange(logits.shape[0], device=logits.device) * 7 % logits.shape[1]
    labels[1] = -100
    return labels


@pytest.mark.covering(
    "divergence.operands deterministic_mode", "option deterministic_mode", "divergence"
)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_ten_runs_on_the_cpu_path(divergence, option, deterministic_mode, threads, monkeypatch):
    monkeypatch.setattr(dense, "CHUNK_ELEMENTS", 1 << 14)  # several chunks
    threads(1)
    student, teacher = make_logits((17, 4099))
    distinct, n_addresses = ten_runs(
        student, teacher, divergence=divergence, labels=labels_of(student), **OPTIONS[option]
    )
    assert n_addresses > 1
    assert distinct == 0


@pytest.mark.covering("divergence.operands")
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_one_thread_and_two(divergence, threads):
    """Few runs: where other processes have the cores, threads that wait for each other are slow."""
    student, teacher = make_logits((17, 4099))  # enough elements for PyTorch to share them out
    options = {"divergence": divergence, "labels": labels_of(student), "hard_label_weight": 0.4}
    results = []
    for n_threads in (1, 2, 2):
        threads(n_threads)
        results.append(run(distillation_loss, student, teacher, **options))
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


@pytest.mark.covering("divergence.operands")
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_a_lone_row_is_not_split_among_threads(divergence, threads):
    """PyTorch sums a single long row in parts, one a thread; a row among others it does not."""
    threads(2)
    student, teacher = make_logits((2, 70_001))
    options = {"divergence": divergence, "reduction": "none", "upstream_seed": None}
    together = run(distillation_loss, student, teacher, **options)
    alone = run(distillation_loss, student[:1], teacher[:1], **options)
    assert torch.equal(alone.loss, together.loss[:1])
    assert torch.equal(alone.gradient, together.gradient[:1])


@pytest.mark.covering("divergence", "option")
@pytest.mark.interpreter
@pytest.mark.parametrize("option", ["forward", "hard"])
@pytest.mark.parametrize("divergence", DIVERGENCES[:4], ids=str)
def test_ten_runs_of_the_kernels(divergence, option, kernel_device):
    pair = make_logits((3, 129), dtype=torch.bfloat16, device=kernel_device("triton"))
    distinct, n_addresses = ten_runs(
        *pair, divergence=divergence, backend="triton", labels=labels_of(pair[0]), **OPTIONS[option]
    )
    assert n_addresses > 1
    assert distinct == 0


def test_a_difference_is_seen():
    """The comparison of runs can fail."""
    temperatures = iter([1.0] * 4 + [1.0 + 1e-6] + [1.0] * (RUNS - 5))

    def changing(student, teacher):
        return distillation_loss(student, teacher, temperature=next(temperatures))

    assert ten_runs(*make_logits((3, 200)), changing)[0] == 1
