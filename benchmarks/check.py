"""Correctness before speed: value and gradient against the float64 reference.

The inputs have the full shape, so that what is checked is what will be timed (nothing compiles
again), but only a few distinct rows, so that the reference is cheap and every row is compared.
"""

import math
from dataclasses import astuple, dataclass, fields

import torch

from distill_ops import reference

from .cases import Case
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
    largest_log = max(-x.detach().log_softmax(-1).min().item() for x in (q, p))
    return Truth(loss.item(), gradient, largest_log, case.torch_dtype)


def run_once(function: LossFunction, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    loss = function(student, teacher)
    loss.backward()
    return loss.detach()


def measure_errors(
    function: LossFunction, student: torch.Tensor, teacher: torch.Tensor, truth: Truth
) -> Errors:
    """Of the loss with and without a gradient, and of the gradient; leaves none behind."""
    student.grad = None
    value = run_once(function, student, teacher).item()
    with torch.no_grad():
        value_alone = function(student, teacher).item()
    gradient, student.grad = student.grad, None
    tokens, rows = len(student), len(truth.gradient)
    squares = truth_squares = worst = 0.0
    for row in range(rows):
        repeats = gradient[row::rows].double() * tokens
        difference = repeats - truth.gradient[row]
        squares += difference.square().sum().item()
        truth_squares += truth.gradient[row].square().sum().item() * len(repeats)
        # max() would lose a NaN; the sum of squares keeps it
        worst = max(worst, difference.abs().max().item())
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
    return Errors(
        2 * yardstick.value + FEW * of_logs,
        2 * yardstick.gradient + FEW * (eps + of_logs),
        2 * yardstick.worst + FEW * (eps + of_logs),
    )


def require(errors: Errors, limits: Errors) -> None:
    """Raises Wrong, with the error and its limit; NaN is wrong."""
    for field, error, limit in zip(fields(Errors), astuple(errors), astuple(limits), strict=True):
        if not error <= limit:
            raise Wrong(f"{field.name} error {error:.2e}, at most {limit:.2e} allowed")
