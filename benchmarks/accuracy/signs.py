"""Where rounding decides the total variation's gradient.

It jumps where q = p: the slope of a column is ``q / 2`` or ``-q / 2`` (any number between, in the
point itself), which moves the gradient by ``q_j (1 - q_j)`` in that entry and by ``q_i q_j`` in the row's
others. Where float32 cannot tell q from p, each of these is right.
"""

import torch

ROUNDINGS = 2  # of float32, of each logarithm


def undecided(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Columns whose sign of q - p is beyond float32: logarithms are rounded by their size, and all
    of a row by its normaliser, a number between 1 and the vocabulary's size."""
    size = torch.maximum(-log_q, -log_p).clamp(min=1.0)
    near = (log_q - log_p).abs() <= ROUNDINGS * torch.finfo(torch.float32).eps * size
    return near & size.isfinite()  # a probability of 0 is none that rounding makes


class Signs:
    """The signs of q - p of some rows, in float64, and those that are undecided."""

    def __init__(self, student: torch.Tensor, teacher: torch.Tensor, temperature: float):
        log_q, log_p = (x.double().div(temperature).log_softmax(-1) for x in (student, teacher))
        self.q, self.temperature = log_q.exp(), temperature
        self.signs = (log_q - log_p).sign()
        self.undecided = undecided(log_q, log_p)

    def nearest(self, gradient: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The true gradient that ``gradient`` is nearest to, ``[N, V]`` of N tokens' sum, and how
        many of its signs are not float64's. Of the undecided columns the heavy ones choose first."""
        gradient = gradient.double() * self.temperature
        rows = zip(self.q, self.signs, self.undecided, gradient, strict=True)
        signs = torch.stack([_nearest_signs(*row) for row in rows])
        nearest = torch.stack([of_signs(*row) for row in zip(self.q, signs, strict=True)])
        return nearest / self.temperature, int((signs != self.signs).sum())


def _nearest_signs(
    q: torch.Tensor, truth: torch.Tensor, free: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    """The signs of one row whose gradient is nearest, of those that leave decided columns alone."""
    signs = truth.clone()

    def error(column: int, sign: float) -> float:
        signs[column] = sign
        return (gradient - of_signs(q, signs)).square().sum().item()

    for column in q.masked_fill(~free, -1.0).argsort(descending=True)[: int(free.sum())].tolist():
        # the first of equals: where it does not matter, the true one
        choices = (truth[column].item(), -1.0, 0.0, 1.0)
        signs[column] = min(choices, key=lambda sign, column=column: error(column, sign))
    return signs


def of_signs(q: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """The gradient of a row at temperature 1."""
    slope = q * signs / 2
    return slope - q * slope.sum()
