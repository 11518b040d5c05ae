"""What each divergence makes of a student that cannot be its teacher.

    python examples/mode_seeking.py

The teacher is a mixture of two Gaussians on 121 points, the student one Gaussian on the same points:
whatever it does, it misses a mode or fills the gap between them. Every divergence of the package is
minimised over the student's mean and standard deviation from a grid of starts, all starts as rows of
one call of ``distill_ops.distillation_loss`` in float64. Printed, and written to ``mode_seeking.json``
and ``mode_seeking.png`` under ``--out``: the global minimum of each, the local ones, how many starts
end in which; and where along its parameter a family's global minimum changes from covering both modes
to seeking one. Needs matplotlib and rich.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from minimise import minimise
from mode_report import draw, show
from report import console, surroundings
from rich.progress import Progress

from distill_ops import (
    AlphaBeta,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SoftCrossEntropy,
    SymmetricKL,
    TotalVariation,
    distillation_loss,
)
from distill_ops.divergences.base import Divergence

RESULTS = Path(__file__).parent / "results"
POINTS = torch.linspace(-6, 6, 121, dtype=torch.float64)
MODES = ((0.6, -2.0, 0.6), (0.4, 2.5, 0.6))  # weight, mean, standard deviation
EMPTY = 0.01  # a distribution is as good as 0 where it is below this share of its largest value

DIVERGENCES: dict[str, Divergence] = {
    "soft cross-entropy": SoftCrossEntropy(),
    "forward KL": ForwardKL(),
    "skew forward KL 0.1": SkewForwardKL(0.1),
    "symmetric KL": SymmetricKL(),
    "Jensen-Shannon 0.1": JensenShannon(0.1),
    "Jensen-Shannon 0.5": JensenShannon(0.5),
    "Jensen-Shannon 0.9": JensenShannon(0.9),
    "total variation": TotalVariation(),
    "alpha-beta 0.5, 0.5": AlphaBeta(0.5, 0.5),
    "alpha-beta 0.2, 0.7": AlphaBeta(0.2, 0.7),
    "skew reverse KL 0.1": SkewReverseKL(0.1),
    "reverse KL": ReverseKL(),
}
Family = Callable[[torch.Tensor], Divergence]  # of a parameter a row, inside (0, 1)
FAMILIES: dict[str, Family] = {
    "SymmetricKL(weight)": SymmetricKL,
    "JensenShannon(beta)": JensenShannon,
    "AlphaBeta(1 - x, x)": lambda x: AlphaBeta(1 - x, x),
    "SkewForwardKL(alpha)": SkewForwardKL,
    "SkewReverseKL(alpha)": SkewReverseKL,
}


class Fit(NamedTuple):
    """Where each start ended: one value a start."""

    mean: torch.Tensor
    sigma: torch.Tensor
    loss: torch.Tensor  # nats, but of total variation and alpha-beta
    is_minimum: torch.Tensor  # bool: else it stopped on a plateau, or is on its way to infinity


def teacher_logits() -> torch.Tensor:
    """The mixture at the points: its logarithm, [121]."""
    density = sum(w / s * torch.exp(-0.5 * ((POINTS - m) / s) ** 2) for w, m, s in MODES)
    return density.log()


def student_logits(where: torch.Tensor) -> torch.Tensor:
    """[..., 2] of mean and log sigma to [..., 121]; the softmax normalises over the points."""
    mean, log_sigma = where[..., :1], where[..., 1:]
    return -0.5 * ((POINTS - mean) / log_sigma.exp()) ** 2


def losses(where: torch.Tensor, divergence: Divergence) -> torch.Tensor:
    """One loss a row of ``where``, differentiable: all of them are one call."""
    logits = student_logits(where)
    teacher = teacher_logits().expand_as(logits)  # one row for all, not copied
    return distillation_loss(logits, teacher, divergence=divergence, reduction="none")


def grid(n_means: int, n_sigmas: int) -> torch.Tensor:
    """Starts, [n_means * n_sigmas, 2]: means from -5 to 5, standard deviations from 0.3 to 3."""
    means = torch.linspace(-5, 5, n_means, dtype=torch.float64)
    log_sigmas = torch.linspace(math.log(0.3), math.log(3), n_sigmas, dtype=torch.float64)
    return torch.cartesian_prod(means, log_sigmas)


def rise_around(where: torch.Tensor, divergence: Divergence, radius: float = 0.02) -> torch.Tensor:
    """How far above the loss of each row the least loss on a circle around it is."""
    angles = torch.arange(16, dtype=torch.float64) * (2 * math.pi / 16)
    circle = radius * torch.stack([angles.cos(), angles.sin()], -1)
    around = torch.stack([losses(where + step, divergence) for step in circle])
    return around.min(0).values - losses(where, divergence)


@torch.no_grad()
def fit(divergence: Divergence, starts: torch.Tensor) -> Fit:
    """Minimise from every start. A divergence's parameter may be a tensor, one value a start."""
    where = minimise(lambda x: losses(x, divergence), starts)
    loss = losses(where, divergence)
    return Fit(where[:, 0], where[:, 1].exp(), loss, rise_around(where, divergence) > 1e-6 * loss)


def student_of(mean: float, sigma: float) -> torch.Tensor:
    where = torch.tensor([mean, math.log(sigma)], dtype=torch.float64)
    return student_logits(where).softmax(-1)


def misfit(mean: float, sigma: float) -> dict[str, float]:
    """What it costs: the student's mass where the teacher is empty, the teacher's where the student is."""
    q, p = student_of(mean, sigma), teacher_logits().softmax(-1)
    return {
        "void": q[p < EMPTY * p.max()].sum().item(),
        "missed": p[q < EMPTY * q.max()].sum().item(),
    }


def minima_of(found: Fit) -> list[dict]:
    """The distinct minima, the global one first, each with the number of its starts."""
    minima = []
    for i in found.loss.argsort().tolist():
        if not found.is_minimum[i]:
            continue
        mean, sigma = found.mean[i].item(), found.sigma[i].item()
        same = (
            known
            for known in minima
            if abs(known["mean"] - mean) < 0.01 and abs(known["sigma"] - sigma) < 0.01
        )
        if known := next(same, None):
            known["starts"] += 1
        else:
            minimum = {"mean": mean, "sigma": sigma, "loss": found.loss[i].item(), "starts": 1}
            minima.append(minimum | misfit(mean, sigma))
    return minima


def sweep(family: Family, values: torch.Tensor, starts: torch.Tensor) -> list[dict]:
    """The global minimum at each value of a parameter: every value from every start, in one call."""
    n_starts = len(starts)
    found = fit(family(values.repeat_interleave(n_starts)), starts.repeat(len(values), 1))
    by_value = zip(*(x.view(-1, n_starts) for x in found), strict=True)
    minima = [minima_of(Fit(*rows))[0] for rows in by_value]
    return [{"parameter": x, **minimum} for x, minimum in zip(values.tolist(), minima, strict=True)]


def run(quick: bool) -> dict:
    """The whole experiment; all that ``mode_seeking.json`` holds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a call has less work than it takes to share it out
    try:
        return experiment(quick)
    finally:
        torch.set_num_threads(threads)


def experiment(quick: bool) -> dict:
    n_means, n_sigmas, n_values = (9, 4, 9) if quick else (31, 11, 49)
    starts, few = grid(n_means, n_sigmas), grid(5, 2) if quick else grid(5, 3)
    values = torch.linspace(0, 1, n_values + 2, dtype=torch.float64)[1:-1]
    fits, sweeps = {}, {}
    with Progress(console=console) as progress:
        task = progress.add_task("divergences", total=len(DIVERGENCES) + len(FAMILIES))
        for name, divergence in DIVERGENCES.items():
            found = fit(divergence, starts)
            stuck = int((~found.is_minimum).sum())
            fits[name] = {
                "divergence": repr(divergence),
                "minima": minima_of(found),
                "starts_without_a_minimum": stuck,
            }
            progress.advance(task)
        for name, family in FAMILIES.items():
            sweeps[name] = sweep(family, values, few)
            progress.advance(task)
    return surroundings(("torch", "distill_ops")) | {
        "config": {
            "points": [POINTS[0].item(), POINTS[-1].item(), len(POINTS)],
            "modes": [dict(zip(("weight", "mean", "sigma"), mode, strict=True)) for mode in MODES],
            "empty_below": EMPTY,
            "starts": {
                "means": [-5, 5, n_means],
                "sigmas": [0.3, 3, n_sigmas],
                "count": len(starts),
            },
        },
        "divergences": fits,
        "families": sweeps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder to write to (default examples/results)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer starts, a few seconds; by default written to a temporary folder",
    )
    options = parser.parse_args()
    out = options.out or (Path(tempfile.mkdtemp("_mode_seeking")) if options.quick else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    record = run(options.quick)
    (out / "mode_seeking.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(record, out / "mode_seeking.png")
    show(record)
    console.print(f"written to {out}")


if __name__ == "__main__":
    main()
