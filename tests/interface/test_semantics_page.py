"""``docs/semantics.md`` is what the code computes: its formulas and its worked values."""

import math
import re
from functools import partial

import pytest
import torch

import distill_ops
from distill_ops import reference
from distill_ops.divergences import BUILT_IN
from tests.support import ROOT

PAGE = (ROOT / "docs/semantics.md").read_text()
NAMES = {name: getattr(distill_ops, name) for name in distill_ops.__all__}


def table(section: int) -> list[list[str]]:
    """The rows of a section's table, its cells without backticks."""
    text = re.search(rf"^## {section}\. .*?(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("`") for cell in row.strip("|").split(" | ")] for row in rows[1:]]


FORMULAS = {row[0]: row[1:] for row in table(2)}


def test_every_divergence_has_its_formula():
    assert set(FORMULAS) == set(BUILT_IN)


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
    exec(definition.strip(" |`"), names)
    values, slopes = divergence.on_columns(log_q, log_p, list(divergence.parameters))
    torch.testing.assert_close(eval(value, names), values, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(eval(slope, names), slopes, rtol=1e-12, atol=1e-14)


ROWS = {
    "S": [1, 2, -1, 0.5, 0],
    "Q": [0.5, 1.5, 0, -0.5, 2],
    "S2": [1, 2, -math.inf, 0.5, 0],
    "Q2": [0.5, 1.5, -math.inf, -0.5, 2],
}
LOSSES = {
    "reference": reference.distillation_loss,
    "CPU path": partial(distill_ops.distillation_loss, backend="torch"),
}


@pytest.mark.parametrize("path", LOSSES)
def test_worked_values(path):
    worked = table(14)
    assert {eval(made, NAMES).name for made, *_ in worked} == set(BUILT_IN)
    for made, options, rows, loss, gradient in worked:
        student, teacher = (
            torch.tensor([ROWS[row]], dtype=torch.float64) for row in rows.split(", ")
        )
        student.requires_grad_()
        options = eval(f"dict({options})")
        if "labels" in options:
            options["labels"] = torch.tensor([options["labels"]])
        found = LOSSES[path](student, teacher, divergence=eval(made, NAMES), **options)
        found.backward()
        where = f"{made} of {rows}, {options}"
        assert found.item() == pytest.approx(float(loss), abs=1e-11), where
        truth = eval(gradient)
        assert student.grad[0].tolist() == pytest.approx(truth, abs=3e-10), where


def test_rows_of_the_worked_values():
    listed = re.findall(r"\b([SQ]) +=( \[[^]]*\])", PAGE)
    assert {name: eval(row) for name, row in listed} == {name: ROWS[name] for name in "SQ"}


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


def test_worked_weights():
    expected = re.search(r"`hard_label_weight=1`: ([\d.]+\d)", PAGE)[1]
    logits = torch.tensor([ROWS["S"], ROWS["Q"]], dtype=torch.float64)
    loss = distill_ops.distillation_loss(
        logits, None, hard_label_weight=1, labels=torch.tensor([1, 4]),
        loss_mask=torch.tensor([0.75, 0.25]),
    )  # fmt: skip
    assert loss.item() == pytest.approx(float(expected), abs=1e-11)
