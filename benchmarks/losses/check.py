"""Correctness before speed: value and gradient against the float64 reference.

The inputs have the full shape, so that what is checked is what will be timed (nothing compiles
again), but only a few distinct rows, so that the reference is cheap and every row is compared.
"""

import math
from dataclasses import astuple, dataclass, fields

import torch

from distill_ops import reference

from ..accuracy.signs import undecided
from .cases import Case, Inputs
from .providers import LossFunction

DISTINCT_ROWS = 8
FEW = 2  # roundings


class Wrong(Exception):
    """A provider's results are not those of the reference."""


@dataclass(frozen=True)
class Truth:
    value: float
    gradient: torch.Tensor  # [distinct, V], float64: of the sum over tokens
    largest_log: float  # the largest magnitude of a log-probability
    dtype: torch.dtype
    undecided: torch.Tensor  # [distinct], float64: the student's probability of undecided columns


@dataclass(frozen=True)
class Errors:
    """``value`` in nats; ``gradient`` by norm and ``worst`` by entry, relative to the truth's."""

    value: float
    gradient: float
    worst: float


def make_truth(case: Case, student: torch.Tensor, teacher: torch.Tensor) -> Truth:
    """The reference on the first DISTINCT_ROWS rows, weighted by how often they repeat."""
    rows = min(DISTINCT_ROWS, case.tokens)
    counts = torch.arange(case.tokens, device=student.device).remainder(rows).bincount().double()
    q = student[:rows].detach().double().requires_grad_()
    p = teacher[:rows].double()
    loss = reference.distillation_loss(q, p, divergence=case.loss, loss_mask=counts)
    loss.backward()
    gradient = q.grad * case.tokens / counts[:, None]
    log_q, log_p = (x.detach().log_softmax(-1) for x in (q, p))
    largest_log = max(-log_q.min().item(), -log_p.min().item())
    flips = torch.zeros(rows, dtype=q.dtype, device=q.device)
    if case.loss == "total_variation":  # of these columns either sign of the slope is right
        flips = log_q.exp().where(undecided(log_q, log_p), 0.0).sum(-1)
    return Truth(loss.item(), gradient, largest_log, case.torch_dtype, flips)


def run_once(function: LossFunction, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    loss = function(student, teacher)
    loss.backward()
    return loss.detach()


def measure_errors(
    function: LossFunction, inputs: Inputs, truth: Truth, inplace: bool = False
) -> Errors:
    """Of the loss with and without a gradient, and of the gradient; leaves none behind."""
    inputs.reset()
    with torch.no_grad():
        value_alone = function(inputs.student_for(inplace), inputs.teacher).item()
    value = run_once(function, inputs.student_for(inplace), inputs.teacher).item()
    gradient = inputs.student.grad
    tokens, rows = len(gradient), len(truth.gradient)
    squares = truth_squares = worst = 0.0
    for row in range(rows):
        repeats = gradient[row::rows].double() * tokens
        difference = repeats - truth.gradient[row]
        squares += difference.square().sum().item()
        truth_squares += truth.gradient[row].square().sum().item() * len(repeats)
        # max() would lose a NaN; the sum of squares keeps it
        worst = max(worst, difference.abs().max().item())
    inputs.student.grad = None
    return Errors(
        max(abs(value - truth.value), abs(value_alone - truth.value)),
        (squares / truth_squares) ** 0.5,
        worst / truth.gradient.abs().max().item(),
    )


def allowed(truth: Truth, native: bool, yardstick: Errors | None) -> Errors:
    """Twice the yardstick's errors and a few roundings: of the gradient, to its dtype, and of the
    logarithms, to the logits' dtype (``native``) or float32, which is absolute in the results.

    The yardstick itself has none to be held against: it may add a long sum's rounding in float32.
    """
    eps = torch.finfo(truth.dtype).eps
    eps32 = torch.finfo(torch.float32).eps
    of_logs = (eps if native else eps32) * truth.largest_log
    if yardstick is None:
        yardstick = Errors(0.0, 0.0, 0.0)
        of_logs += eps32 * math.sqrt(truth.gradient.shape[-1])
    # a flipped slope moves its entry by q_j and, through the slopes' sum, the row by q_i q_j
    flipped = 2 * truth.undecided
    return Errors(
        2 * yardstick.value + FEW * of_logs,
        2 * yardstick.gradient
        + FEW * (eps + of_logs)
        + (flipped.norm() / truth.gradient.norm()).item(),
        2 * yardstick.worst
        + FEW * (eps + of_logs)
        + (flipped.max() / truth.gradient.abs().max()).item(),
    )


def require(errors: Errors, limits: Errors) -> None:
    """Raises Wrong, with the error and its limit; NaN is wrong."""
    for field, error, limit in zip(fields(Errors), astuple(errors), astuple(limits), strict=True):
        if not error <= limit:
            raise Wrong(f"{field.name} error {error:.2e}, at most {limit:.2e} allowed")
