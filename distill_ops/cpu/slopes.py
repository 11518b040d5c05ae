"""From the slopes of a chunk of rows to its gradient, ``scale (slope - q D)`` with ``D = sum(slope)``.

Both classes are what a closed form gives besides the losses, to use once and after them. Called with a
matrix ``out`` they write the gradient of whole rows, whose D they sum themselves. Of rows whose columns
ranks split, ``total`` is what the chunk's columns add to D, without the scale, and ``of_part`` writes
the scaled slopes and ``of_q q``, ``[rows]``, which is ``-scale D`` of the whole row at least.
"""

from collections.abc import Callable

import torch

from .rows import row_sums

Factor = float | torch.Tensor  # a number, [] or [rows, 1]

softmax_backward = torch.ops.aten._softmax_backward_data.out
log_softmax_backward = torch.ops.aten._log_softmax_backward_data.out


def flat(factor: Factor) -> Factor:
    """As it goes with ``[rows]``."""
    return factor.squeeze(-1) if isinstance(factor, torch.Tensor) else factor


class Slope:
    """Of ``c slope``, which ``make`` gives in memory of its own; ``q`` may be left out where ``log_q``,
    its logarithm, is there."""

    def __init__(
        self, make: Callable[[], torch.Tensor], c: Factor, scale: Factor,
        log_q: torch.Tensor | None = None, q: torch.Tensor | None = None,
    ):  # fmt: skip
        self.make, self.c, self.scale, self.log_q, self.q = make, c, scale, log_q, q

    def __call__(self, out: torch.Tensor) -> None:
        slope = self.make().mul_(self.c * self.scale)
        if self.q is None:
            log_softmax_backward(slope, self.log_q, -1, slope.dtype, out=out)
        else:  # no rounding of q's sum is left: the row sums to 0
            mean = row_sums(slope).div_(row_sums(self.q))[:, None]
            torch.addcmul(slope, self.q, mean, value=-1, out=out)

    def total(self) -> torch.Tensor:
        return row_sums(self.make()) * flat(self.c)

    def of_part(self, of_q: torch.Tensor, out: torch.Tensor) -> None:
        slope = self.make().mul_(self.c * self.scale)
        q = self.log_q.exp_() if self.q is None else self.q
        torch.addcmul(slope, q, of_q[:, None], out=out)


class SlopeOfSoftmax:
    """Of ``c q (h + k)``, of which ``make`` gives h: the gradient is ``scale c q (h - sum(q h))``.

    ``mean`` is ``sum(q h)`` where the losses have it, else it is summed in ``room``. In a peaked row it
    and h nearly cancel, and what rounded q and the sum would be all that is left: so ``near``, which is
    about the mean, goes first."""

    def __init__(
        self, make: Callable[[], torch.Tensor], c: Factor, scale: Factor, q: torch.Tensor,
        room: torch.Tensor | None = None, k: float = 0.0, mean: torch.Tensor | None = None,
        near: torch.Tensor | None = None,
    ):  # fmt: skip
        self.make, self.c, self.scale, self.q, self.room = make, c, scale, q, room
        self.k, self.mean, self.near = k, mean, mean if near is None else near

    def _sum(self, h: torch.Tensor) -> torch.Tensor:
        return row_sums(torch.mul(self.q, h, out=self.room))

    def __call__(self, out: torch.Tensor) -> None:
        h, scale = self.make(), self.c * self.scale
        near = self._sum(h) if self.near is None else self.near
        if isinstance(scale, torch.Tensor):
            h.sub_(near[:, None]).mul_(scale)
        else:
            torch.add(near[:, None] * -scale, h, alpha=scale, out=h)
        softmax_backward(h, self.q, -1, self.q.dtype, grad_input=out)

    def total(self) -> torch.Tensor:
        total = self._sum(self.make()) if self.mean is None else self.mean
        if self.k:
            total = total + self.k * row_sums(self.q)
        return total * flat(self.c)

    def of_part(self, of_q: torch.Tensor, out: torch.Tensor) -> None:
        scale = self.c * self.scale
        h = self.make().mul_(scale).add_(of_q[:, None] + self.k * scale)
        torch.mul(h, self.q, out=out)
