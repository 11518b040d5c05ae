"""``docs/semantics.md`` is what the code computes: its formulas, and the numbers between its tables.

Its table of worked values is what ``tests/oracle/test_dense.py`` holds every path against."""

import re

import pytest
import torch

import distill_ops
from distill_ops.divergences.built_in import BUILT_IN
from tests.support import ROOT
from tests.support.semantics_page import FORMULAS, NAMES, PAGE, ROWS, table, worked_values


def test_every_divergence_is_on_the_page():
    assert set(FORMULAS) == set(BUILT_IN)
    assert {divergence.name for divergence, *_ in worked_values()} == set(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_formulas(name):
    made, value, slope, definition = FORMULAS[name]
    divergence = eval(made, NAMES)
    assert divergence == BUILT_IN[name]()  # with its default parameters
    torch.manual_seed(0)
    log_q, log_p = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    names = {"log_q": log_q, "log_p": log_p, "q": log_q.exp(), "p": log_p.exp()}
    names |= {"log": torch.log, "sign": torch.sign, "abs": torch.abs}
    names |= dict(zip(divergence.__match_args__, divergence.parameters, strict=True))
    exec(definition, names)
    values, slopes = divergence.on_columns(log_q, log_p, list(divergence.parameters))
    torch.testing.assert_close(eval(value, names), values, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(eval(slope, names), slopes, rtol=1e-12, atol=1e-14)


def test_the_readme_lists_every_divergence():
    readme = (ROOT / "README.md").read_text()
    for name, kind in BUILT_IN.items():
        assert f'`"{name}"`' in readme or f"`{kind.__name__}(" in readme, name


def test_rows_of_the_worked_values():
    listed = re.findall(r"\b([SQ]) +=( \[[^]]*\])", PAGE)
    assert {name: tuple(eval(row)) for name, row in listed} == {name: ROWS[name] for name in "SQ"}


def test_worked_token_log_probability():
    log_prob, gradient = re.search(
        r"log-probability of token 1 under S at T = 2 is (\S+), with the gradient\s+(\[[^]]*\])",
        PAGE,
    ).groups()
    logits = torch.tensor([ROWS["S"]], dtype=torch.float64, requires_grad=True)
    found = distill_ops.token_log_probs(logits, torch.tensor([1]), temperature=2)
    found.sum().backward()
    assert found.item() == pytest.approx(float(log_prob), abs=1e-11)
    assert logits.grad[0].tolist() == pytest.approx(eval(gradient), abs=1e-10)


WORKED = table(11)


@pytest.mark.parametrize(
    ("divergence", "options", "loss", "gradient"), WORKED, ids=lambda x: x[:36]
)
@pytest.mark.parametrize("package", [distill_ops, distill_ops.reference], ids=["CPU", "reference"])
def test_worked_tails(package, divergence, options, loss, gradient):
    assert len(WORKED) == 8
    student = torch.tensor([ROWS["S"]], dtype=torch.float64, requires_grad=True)
    log_p, ids = torch.tensor([[0.5, 0.3]], dtype=torch.float64).log(), torch.tensor([[4, 1]])
    found = package.topk_distillation_loss(
        student, log_p, ids, divergence=eval(divergence), **eval(f"dict({options})")
    )
    found.backward()
    assert found.item() == pytest.approx(float(loss), abs=1e-11)
    assert student.grad[0].tolist() == pytest.approx(eval(gradient), abs=1e-10)


def test_worked_weights():
    expected = re.search(r"`hard_label_weight=1`: ([\d.]+\d)", PAGE)[1]
    logits = torch.tensor([ROWS["S"], ROWS["Q"]], dtype=torch.float64)
    loss = distill_ops.distillation_loss(
        logits, None, hard_label_weight=1, labels=torch.tensor([1, 4]),
        loss_mask=torch.tensor([0.75, 0.25]),
    )  # fmt: skip
    assert loss.item() == pytest.approx(float(expected), abs=1e-11)
