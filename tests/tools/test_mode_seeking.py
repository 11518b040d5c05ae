"""The mode-seeking example: its numbers, that its minima are global, and what is published of them."""

import importlib
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from distill_ops import (
    AlphaBeta,
    JensenShannon,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    distillation_loss,
)
from distill_ops.divergences.built_in import BUILT_IN
from tests.support import ROOT, formulas, optional

for name in ("matplotlib", "rich"):
    optional(name)

EXAMPLES = ROOT / "examples"
MODULES = [path.stem for path in EXAMPLES.glob("*.py")]
PUBLISHED = json.loads((EXAMPLES / "results/mode_seeking.json").read_text())
VOCABULARY = 16
FOUND = ("mean", "sigma", "loss")


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The script's modules, and the record of its quick form, through its command line."""
    folder = tmp_path_factory.mktemp("mode_seeking")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        script, report = map(importlib.import_module, ("mode_seeking", "mode_report"))
        patch.setattr(sys, "argv", ["mode_seeking.py", "--quick", "--out", str(folder)])
        threads = torch.get_num_threads()
        script.main()
        assert torch.get_num_threads() == threads
        record = json.loads((folder / "mode_seeking.json").read_text())
        assert (folder / "mode_seeking.png").read_bytes().startswith(b"\x89PNG")
        yield SimpleNamespace(script=script, report=report, record=record)
    for module in MODULES:
        sys.modules.pop(module, None)


def minima(record: dict, name: str) -> list[dict]:
    return record["divergences"][name]["minima"]


def test_the_two_kls(example):
    """The covering and the seeking minimum, found elsewhere by other means."""
    (forward,) = minima(example.record, "forward KL")  # convex in the natural parameters
    assert forward["mean"] == pytest.approx(-0.218, abs=1e-3)
    assert forward["sigma"] == pytest.approx(2.387, abs=1e-3)
    reverse, *others = minima(example.record, "reverse KL")
    assert reverse["mean"] == pytest.approx(-2.000, abs=1e-3)
    assert reverse["sigma"] == pytest.approx(0.601, abs=1e-3)
    assert reverse["loss"] == pytest.approx(0.5106, abs=1e-3)
    assert [round(m["mean"], 1) for m in others] == [2.5, 0.0]  # the other mode, then both
    (soft,) = minima(example.record, "soft cross-entropy")
    teacher = example.script.teacher_logits().softmax(-1)
    entropy = -(teacher * teacher.log()).sum().item()
    assert soft["loss"] - forward["loss"] == pytest.approx(entropy, abs=1e-12)


def test_every_divergence_is_fitted(example):
    assert {d.name for d in example.script.DIVERGENCES.values()} == set(BUILT_IN)


def test_the_minima_are_global(example):
    """By the formulas of the tests: the same loss there, and no lower one over a fine grid."""
    points, script = example.script.POINTS, example.script
    p = script.teacher_logits().exp()
    p = p / p.sum()
    means = torch.linspace(-6, 6, 61, dtype=torch.float64)
    sigmas = torch.linspace(math.log(0.35), math.log(5), 31, dtype=torch.float64).exp()

    def losses(divergence, mean, sigma):
        q = torch.exp(-0.5 * ((points - mean[..., None]) / sigma[..., None]) ** 2)
        q = q / q.sum(-1, keepdim=True)
        return formulas.terms(divergence, q, p)[0].sum(-1)

    for name, divergence in script.DIVERGENCES.items():
        best = minima(example.record, name)[0]
        here = losses(divergence, *torch.tensor([[best["mean"]], [best["sigma"]]]).double())
        assert here.item() == pytest.approx(best["loss"], rel=1e-6)
        everywhere = losses(divergence, *torch.meshgrid(means, sigmas, indexing="ij"))
        assert everywhere.min() >= best["loss"] * (1 - 1e-9), name


def test_what_is_published_is_what_runs(example):
    """JSON (and with it the plot): the same minima from more starts."""
    assert set(PUBLISHED["divergences"]) == set(example.record["divergences"])
    assert PUBLISHED["config"]["modes"] == example.record["config"]["modes"]
    assert PUBLISHED["config"]["points"] == example.record["config"]["points"]
    for name in PUBLISHED["divergences"]:
        published, found = minima(PUBLISHED, name), minima(example.record, name)
        assert len(published) == len(found), name
        for a, b in zip(published, found, strict=True):
            for key in (*FOUND, "void", "missed"):
                assert a[key] == pytest.approx(b[key], abs=1e-3), (name, key)
        starts = sum(minimum["starts"] for minimum in published)
        assert starts == PUBLISHED["config"]["starts"]["count"], name  # none is lost


def test_where_families_turn(example):
    """From the forward KL, which covers, to the reverse, which seeks; the skew ones cross over."""
    for name, points in example.record["families"].items():
        ends = [example.report.behaviour(points[i]) for i in (0, -1)]
        expected = ["seeks", "covers"] if name == "SkewReverseKL(alpha)" else ["covers", "seeks"]
        assert ends == expected, name
        published = {round(p["parameter"], 9): p for p in PUBLISHED["families"][name]}
        for point in points:
            other = published[round(point["parameter"], 9)]
            assert point["sigma"] == pytest.approx(other["sigma"], abs=1e-3), (name, point)


def test_what_the_page_says(example):
    """Its numbers are those of the JSON, and what it says of them holds."""
    page = (ROOT / "docs/which-divergence.md").read_text()
    assert example.report.markdown(PUBLISHED) in page
    behaviour = example.report.behaviour
    assert [behaviour(m) for m in minima(PUBLISHED, "reverse KL")] == ["seeks", "seeks", "covers"]
    seeking, covering, _ = minima(PUBLISHED, "Jensen-Shannon 0.5")
    assert [behaviour(m) for m in (seeking, covering)] == ["seeks", "covers"]
    assert covering["starts"] > PUBLISHED["config"]["starts"]["count"] / 2
    (symmetric,) = minima(PUBLISHED, "symmetric KL")
    assert behaviour(symmetric) == "covers"
    sigma_of_mode = PUBLISHED["config"]["modes"][0]["sigma"]
    assert minima(PUBLISHED, "total variation")[0]["sigma"] > 1.5 * sigma_of_mode
    after = [p["sigma"] for p in PUBLISHED["families"]["SymmetricKL(weight)"][-10:]]
    assert sorted(after, reverse=True) == after
    assert after[0] > 1.5 * after[-1]


def bound_of(divergence) -> float:
    """The column "at most" of docs/which-divergence.md."""
    if isinstance(divergence, JensenShannon):
        b = divergence.beta
        return -b * math.log(b) - (1 - b) * math.log(1 - b)
    if isinstance(divergence, AlphaBeta):
        a, b = divergence.alpha, divergence.beta
        return VOCABULARY ** max(0, 1 - a - b) / (a * b)
    return 1.0 if isinstance(divergence, TotalVariation) else -math.log(divergence.alpha)


@pytest.mark.parametrize(
    "divergence",
    [
        *map(JensenShannon, (0.1, 0.5, 0.9)),
        *map(SkewForwardKL, (0.1, 0.7)),
        *map(SkewReverseKL, (0.1, 0.7)),
        TotalVariation(),
        *map(AlphaBeta, (0.5, 0.2, 0.9), (0.5, 0.7, 0.9)),
    ],
    ids=repr,
)
def test_the_bounds_of_the_page(divergence):
    """Kept by random rows, and reached where models exclude each other's tokens (of alpha-beta with a
    sum below 1, to the factor that half of the vocabulary for each costs)."""
    bound = bound_of(divergence)
    generator = torch.Generator().manual_seed(0)
    logits = 10 * torch.randn(2, 200, VOCABULARY, generator=generator, dtype=torch.float64)
    rows = distillation_loss(*logits, divergence=divergence, reduction="none")
    assert rows.max() <= bound
    n = VOCABULARY if getattr(divergence, "alpha", 1) == 0.2 else 2
    apart = torch.full((2, n), -torch.inf, dtype=torch.float64)
    apart[0, : n // 2] = apart[1, n // 2 :] = 0
    reached = distillation_loss(*apart[:, None], divergence=divergence).item()
    expected = bound / 2**0.1 if n == VOCABULARY else bound
    assert reached == pytest.approx(expected, rel=1e-9)


def test_a_page_without_marks_is_refused(example, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- mode_seeking:begin -->\nold\n<!-- mode_seeking:end -->\nb\n")
    example.report.write_into(page, "new")
    assert page.read_text() == "a\n<!-- mode_seeking:begin -->\nnew\n<!-- mode_seeking:end -->\nb\n"
    page.write_text("a\n")
    with pytest.raises(SystemExit, match="must have"):
        example.report.write_into(page, "new")


def test_what_is_no_minimum_is_told(example):
    """Far from the teacher the total variation is flat: a start that stays there has found nothing."""
    starts = torch.tensor([[-5.9, math.log(0.02)], [-2.0, 0.0]], dtype=torch.float64)
    found = example.script.fit(TotalVariation(), starts)
    assert found.is_minimum.tolist() == [False, True]
    assert len(example.script.minima_of(found)) == 1


def test_minimise_with_a_kink(example):
    """``|x - row| + 2 |y + row|``, whose gradient is 0 nowhere near the minimum."""
    rows = torch.arange(3, dtype=torch.float64)

    def function(x):
        return (x[:, 0] - rows).abs() + 2 * (x[:, 1] + rows).abs()

    start = torch.tensor([[0.3, -0.7]], dtype=torch.float64).repeat(3, 1)
    end = sys.modules["minimise"].minimise(function, start)
    torch.testing.assert_close(end, torch.stack([rows, -rows], -1), atol=1e-4, rtol=0)
